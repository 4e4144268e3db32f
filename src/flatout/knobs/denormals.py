"""Denormal numbers: taken for zero, as the processor does it without a detour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "denormals"


def match(facts: Facts) -> Match:
    """By hand only: without denormal numbers there is nothing to gain, and doctor sees them."""
    return Match((), "for programs in which 'flatout doctor' finds denormal numbers")


def apply(host: Host, setting: str) -> Undo:
    """Set the mode of this thread, which threads made later take over."""
    import torch

    if not torch.set_flush_denormal(True):
        raise RefusedError("this processor has no such mode")

    def undo() -> None:
        torch.set_flush_denormal(False)

    return undo


KNOB = Knob(
    name=NAME,
    summary="denormal numbers (below 1.2e-38 in float32) taken for zero",
    settings=("flush",),
    exactness={"flush": "reduced"},
    hot=False,
    platforms=("cpu",),
    card=Card(
        what="`torch.set_flush_denormal(True)` before the program's own code runs. The mode "
        "belongs to a thread; those that torch starts later take it over, so it is set at the "
        "start or not at all.",
        helps="Weights, gradients or moments that decay towards zero without reaching it: an "
        "operation on a denormal number takes some processors a hundred times as long.",
        hurts="A program that needs numbers below 1.2e-38.",
        by_hand="`torch.set_flush_denormal(True)`, first thing",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.set_flush_denormal.html",
            "https://github.com/pytorch/pytorch/issues/19651",
        ),
    ),
    match=match,
    apply=apply,
    claims=("how the processor treats denormal numbers",),
)
