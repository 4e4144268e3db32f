"""Compute elementwise functions for which torch has slow CPU kernels with vectorised ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "elementwise"

OPERATORS = ("::tanh", "::gelu", "::abs")


def match(facts: Facts) -> Match:
    """Offer the setting where a step calls one of these functions."""
    if facts.lack(*OPERATORS):
        return Match((), "no step calls tanh, GELU or abs")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("fast",), share=facts.share(*OPERATORS))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operators, for every thread of this process.

    Raises:
        RefusedError: the kernel cannot be built, or this torch is too old to replace operators.
    """
    from flatout.intercept import dispatch
    from flatout.knobs.elementwise import cpu

    library = dispatch.load_kernel("elementwise", "torch's own operators")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="compute tanh, the tanh-based GELU and complex magnitudes with vectorised kernels",
    settings=("fast",),
    exactness={"fast": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces the CPU kernels of a few elementwise functions that torch "
        "computes far slower than memory bandwidth allows: `tanh`, "
        '`gelu(approximate="tanh")` and its gradient, and `abs` of complex numbers, from '
        "which spectrograms are computed. The kernels of `fast` are compiled for this "
        "processor. Their error is at most two units in the last place for `tanh` and "
        "`abs`, and sixteen for GELU. They handle dense tensors of at least 32,768 "
        "elements in float32 and bfloat16 (`abs`: in complex64). The knob needs a C "
        "compiler.",
        helps="The knob helps language models with the GELU of GPT-2, networks with `tanh`, and "
        "programs that compute spectrograms.",
        hurts="Programs that call these functions on many small tensors become slower: each "
        "call takes some microseconds more, because the operator is replaced by a Python "
        "function. In compiled regions the knob has no effect.",
        by_hand="Compile the module with `torch.compile`; for complex magnitudes, use "
        "`torch.view_as_real(z).norm(dim=-1)`.",
        sources=(
            "https://arxiv.org/abs/1606.08415 (GELU)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.GELU.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernels of tanh, GELU and complex abs",),
    kernels=("elementwise",),
    replaces=OPERATORS,
)
