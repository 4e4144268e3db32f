"""Run Python's cyclic garbage collector rarely instead of every few hundred new objects."""

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
"""The arguments of ``gc.set_threshold``: new objects until a collection of the youngest generation,
and collections of a generation until one of the next. CPython's defaults are 700 (2,000 from 3.13
on), 10 and 10."""

FEWEST_FROZEN = 10_000
"""From this many frozen objects on, the program is taken to have called ``gc.freeze()`` itself:
importing torch alone creates a hundred thousand objects, while CPython 3.12 starts with a few
hundred frozen ones (3.12.1: 375)."""


def match(facts: Facts) -> Match:
    """Offer the setting for every program."""
    return Match(("seldom",))


def apply(host: Host, setting: str) -> Undo:
    """Freeze the objects that exist, and raise the thresholds of the collector.

    Raises:
        RefusedError: the program has disabled the collector, frozen objects or set higher
            thresholds itself.
    """
    before = gc.get_threshold()
    if not gc.isenabled() or gc.get_freeze_count() >= FEWEST_FROZEN or before[0] > THRESHOLDS[0]:
        raise RefusedError("the program configures garbage collection itself")
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)

    def undo() -> None:
        if gc.get_threshold() == THRESHOLDS:
            gc.set_threshold(*before)
        gc.unfreeze()

    return undo


KNOB = Knob(
    name=NAME,
    summary="run Python's cyclic garbage collector rarely, and only over new objects",
    settings=("seldom",),
    exactness={"seldom": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob calls `gc.freeze()` once, so the collector no longer visits the "
        "hundreds of thousands of objects that importing torch creates. It also sets the "
        "collector's thresholds to 50000, 20, 100. Python still frees objects outside "
        "reference cycles at once.",
        helps="The knob helps short steps that create many Python objects, and distributed "
        "training, where all ranks wait for a rank that collects garbage.",
        hurts="If a program puts tensors into reference cycles, the tensors live longer, so the "
        "program needs more memory.",
        by_hand="Call `gc.freeze(); gc.set_threshold(50000, 20, 100)`.",
        sources=(
            "https://docs.python.org/3/library/gc.html",
            "https://github.com/pytorch/torchtitan/pull/148",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the thresholds of garbage collection",),
    memory_settings=("seldom",),
)
