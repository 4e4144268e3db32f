"""Gated recurrent units: all time steps of a layer in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "recurrent"


def match(facts: Facts) -> Match:
    """Needs such a unit in the step."""
    if facts.lack("aten::gru"):
        return Match((), "there is no GRU in its steps")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("fused",))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator, for every thread of this process."""
    from flatout.intercept import dispatch
    from flatout.knobs.recurrent import cpu

    library = dispatch.load_kernel("gru", "torch's own units")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="GRU layers whose time steps are one call, forward and backward",
    settings=("fused",),
    exactness={"fused": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="`torch.nn.GRU` on the CPU makes ten operations of each time step, and autograd as "
        "many again. `fused` computes the products of the input at once, as torch does, and then "
        "all steps of a layer and direction in one call of a compiled kernel, in which each thread "
        "takes some rows of the batch through all steps; backward likewise. In float32, under "
        "autocast too. Left to torch: packed sequences, units wider than 512, `torch.func`, "
        "compiled regions; LSTM, which oneDNN computes. Needs a C compiler.",
        helps="Training and inference with GRU layers on the CPU, as in speech: narrow units, "
        "long sequences.",
        hurts="Batches of fewer rows than cores use one core for each row.",
        by_hand="There is nothing as fast in torch; convolutions or attention in place of the "
        "recurrence.",
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
)
