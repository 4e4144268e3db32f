"""Run all time steps of a GRU layer in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "recurrent"


def match(facts: Facts) -> Match:
    """Offer the setting where a step contains a GRU."""
    if facts.lack("aten::gru"):
        return Match((), "there is no GRU in a step")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("fused",))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator, for every thread of this process.

    Raises:
        RefusedError: the kernel cannot be built, or this torch is too old to replace operators.
    """
    from flatout.intercept import dispatch
    from flatout.knobs.recurrent import cpu

    library = dispatch.load_kernel("gru", "torch's own GRU operators")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="run all time steps of a GRU layer in one call, forward and backward",
    settings=("fused",),
    exactness={"fused": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces `torch.nn.GRU` on the CPU by a kernel that is compiled for "
        "this processor. Torch runs ten operators for each time step, and autograd as "
        "many again. `fused` computes the input matmuls of all time steps at once, as "
        "torch does, and then all time steps of a layer and direction in one call. In "
        "this call, each thread takes some rows of the batch through all time steps; the "
        "backward pass works in the same way. The kernel computes in float32, even under "
        "autocast. These are left to torch's own code: packed sequences, hidden sizes above "
        "512, `torch.func`, compiled regions, and LSTM (which torch runs in oneDNN). The knob "
        "needs a C compiler.",
        helps="The knob helps training and inference with GRU layers on the CPU that have small "
        "hidden sizes and long sequences, as in speech.",
        hurts="Batches with fewer rows than there are cores become slower, because each row "
        "uses only one core.",
        by_hand="Torch has no equivalent; use convolutions or attention instead of the recurrence.",
        sources=(
            "https://arxiv.org/abs/1406.1078 (GRU)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("gated recurrent units",),
    kernels=("gru",),
    replaces=("aten::gru",),
)
