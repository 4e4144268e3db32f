"""Flush denormal numbers to zero, because some processors compute with them very slowly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "denormals"


def match(facts: Facts) -> Match:
    """Never offered: only ``flatout doctor`` knows whether the program has denormal numbers."""
    return Match((), "applied by hand only, where 'flatout doctor' finds denormal numbers")


def apply(host: Host, setting: str) -> Undo:
    """Set the mode of this thread; threads that it starts later inherit it.

    Raises:
        RefusedError: the processor has no such mode.
    """
    import torch

    if not torch.set_flush_denormal(True):
        raise RefusedError("this processor cannot flush denormal numbers to zero")

    def undo() -> None:
        torch.set_flush_denormal(False)

    return undo


KNOB = Knob(
    name=NAME,
    summary="flush denormal numbers (below 1.2e-38 in float32) to zero",
    settings=("flush",),
    exactness={"flush": "reduced"},
    hot=False,
    platforms=("cpu",),
    card=Card(
        what="The knob calls `torch.set_flush_denormal(True)` before the program's own code "
        "runs. The mode belongs to a thread, and the threads that torch starts later "
        "inherit it; so it is set at the start or not at all.",
        helps="The knob helps if weights, gradients or the optimizer's moments decay towards "
        "zero without reaching it. On some processors, an operation on a denormal number "
        "takes a hundred times as long. `flatout doctor` tells whether a program has such "
        "numbers; `flatout tune` never tries this knob.",
        hurts="The knob must not be used for programs that need numbers below 1.2e-38.",
        by_hand="Call `torch.set_flush_denormal(True)` before anything else.",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.set_flush_denormal.html",
            "https://github.com/pytorch/pytorch/issues/19651",
        ),
    ),
    match=match,
    apply=apply,
    claims=("how the processor treats denormal numbers",),
)
