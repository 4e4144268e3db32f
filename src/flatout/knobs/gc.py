"""Python's cyclic garbage collection: seldom instead of every few hundred objects."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "gc"

THRESHOLDS = (50_000, 20, 100)
"""Objects made since the last collection of the young, and collections of one generation to one of
the next. CPython's own are 700 (2,000 from 3.13 on), 10, 10."""


FEWEST_FROZEN = 10_000
"""Objects that a program which freezes them freezes at least: torch's import alone makes a hundred
thousand. CPython 3.12 starts with some hundred (3.12.1: 375)."""


def match(facts: Facts) -> Match:
    """Worth a trial anywhere."""
    return Match(("seldom",))


def apply(host: Host, setting: str) -> Undo:
    """Put what is alive out of the collector's sight, and let it come seldom."""
    before = gc.get_threshold()
    if not gc.isenabled() or gc.get_freeze_count() >= FEWEST_FROZEN or before[0] > THRESHOLDS[0]:
        raise RefusedError("the program has decided on garbage collection itself")
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)

    def undo() -> None:
        if gc.get_threshold() == THRESHOLDS:
            gc.set_threshold(*before)
        gc.unfreeze()

    return undo


KNOB = Knob(
    name=NAME,
    summary="Python's cyclic garbage collection seldom, and past what was imported",
    settings=("seldom",),
    exactness={"seldom": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="`gc.freeze()` once, so that the hundred thousands of objects which torch's import "
        "makes are not gone through again, and thresholds of "
        + ", ".join(map(str, THRESHOLDS))
        + ". Objects without cycles are freed at once, as ever.",
        helps="Short steps that make many Python objects; ranks that wait for the one which "
        "collects.",
        hurts="Tensors in reference cycles live longer: a program that makes them needs more "
        "memory.",
        by_hand="`gc.freeze(); gc.set_threshold(" + ", ".join(map(str, THRESHOLDS)) + ")`",
        sources=(
            "https://docs.python.org/3/library/gc.html",
            "https://github.com/pytorch/torchtitan/pull/148",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the thresholds of garbage collection",),
)
