"""The workers of a loader are started again for each epoch, and its first batch waits for them."""

from __future__ import annotations

import statistics

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

FEWEST = 2
"""Fewest waits from which the loader is known to start again and again."""

LONG_MS = 20.0
LONG_FACTOR = 8
"""A wait is one for a start if it is longer than this, and than this many times the median wait. A
worker that is forked takes some 10 ms to start, and then makes a batch."""

STARTS_MATTER = 0.01
"""Smallest share that is reported: all of it can be saved by one word."""


def share_of_starts(case: Case) -> tuple[int, float]:
    """Return how many steps waited for workers to start, and the share of the time that it took."""
    loaders = case.facts.loaders or ()
    if not any(loader.workers and not loader.persistent_workers for loader in loaders):
        return 0, 0.0
    waits_ms = [step.phases_ms["data"] or 0.0 for step in case.steps]
    usual_ms = statistics.median(waits_ms)
    long_ms = [ms for ms in waits_ms if ms > max(LONG_MS, LONG_FACTOR * usual_ms)]
    total_ms = sum(step.step_ms for step in case.steps)
    return len(long_ms), sum(ms - usual_ms for ms in long_ms) / total_ms


def find(case: Case) -> Finding | None:
    starts, share = share_of_starts(case)
    if starts < FEWEST or share < STARTS_MATTER:
        return None
    return Finding(
        "workers-restarted",
        "workers that start again for each epoch",
        [f"{starts} of {len(case.steps)} steps wait for the first batch of new workers"],
        share,
        "edit: DataLoader(..., persistent_workers=True)",
    )
