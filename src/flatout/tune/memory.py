"""Checks whether a plan needs too much memory, from the recorded steps of its runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from flatout.tune import formatting
from flatout.wire.record import Step

ALLOWED = 1.1
"""By default, the peak memory that a plan may have, as a multiple of the bare program's."""

LEAK_STEPS = 2000
"""Number of steps after which memory that keeps growing must still be within what is allowed."""

FEWEST_STEPS = 16
"""Growth is measured only in runs with at least this many steps."""


def refusal(
    bare: Sequence[Sequence[Step]], plan: Sequence[Sequence[Step]], allowed: float
) -> str | None:
    """Return the reason why a plan needs too much memory, as a clause.

    The result is ``None`` if the plan needs no more than is allowed, or if memory was not measured.
    If the program uses an accelerator, the accelerator's memory counts, else that of the main
    process, or of all ranks together. Growth is measured in the same memory.

    Args:
        bare, plan: the steps of each run of the bare program and of the plan.
        allowed: the peak memory that the plan may have, as a multiple of bare's.
    """
    read_peak = _read_device_peak
    bare_peak, plan_peak = peak_device_bytes(bare), peak_device_bytes(plan)
    if bare_peak is None or plan_peak is None:
        read_peak = _read_rss_peak
        bare_peak, plan_peak = peak_rss_bytes(bare), peak_rss_bytes(plan)
    if bare_peak is None or plan_peak is None:
        return None
    if plan_peak > allowed * bare_peak:
        return (
            f"its peak memory is {plan_peak / bare_peak:.2f} times bare's "
            f"({formatting.memory(plan_peak)} against {formatting.memory(bare_peak)}; "
            f"--memory {math.ceil(10 * plan_peak / bare_peak) / 10:.1f} would allow it)"
        )
    growth_bytes = _measure_growth(plan, read_peak) - _measure_growth(bare, read_peak)
    if plan_peak + growth_bytes * LEAK_STEPS > allowed * bare_peak:
        return (
            f"its memory grows by {growth_bytes / 1024:.0f} KiB a step more than bare's, and does "
            "not stop"
        )
    return None


def peak_rss_bytes(runs: Sequence[Sequence[Step]]) -> int | None:
    """Return the peak memory of the main process, or of all ranks, the median of the runs.

    The result is ``None`` if it was not measured.
    """
    return _median(steps[-1].peak_rss_bytes for steps in runs if steps)


def peak_device_bytes(runs: Sequence[Sequence[Step]]) -> int | None:
    """Return the peak memory on the accelerator, the median of the runs.

    The result is ``None`` if the program uses no accelerator, or if its memory was not measured.
    """
    return _median(
        max((step.peak_device_bytes or 0 for step in steps), default=0) for steps in runs
    )


def _median(peaks: Iterable[int | None]) -> int | None:
    known = [peak for peak in peaks if peak]
    return round(median(known)) if known else None


def _read_rss_peak(step: Step) -> int | None:
    return step.peak_rss_bytes


def _read_device_peak(step: Step) -> int | None:
    return step.peak_device_bytes


def _measure_growth(
    runs: Sequence[Sequence[Step]], read_peak: Callable[[Step], int | None]
) -> float:
    """Measure by how many bytes per step the peak memory keeps growing; the median of the runs.

    For each run, this is its growth per step in the third quarter of the steps or that in the last
    quarter, whichever is smaller.
    """
    found = []
    for steps in runs:
        known = [peak for step in steps if (peak := read_peak(step)) is not None]
        if len(known) < FEWEST_STEPS:
            continue
        quarter = len(known) // 4
        third = (known[-1 - quarter] - known[-1 - 2 * quarter]) / quarter
        last = (known[-1] - known[-1 - quarter]) / quarter
        found.append(min(third, last))
    return median(found) if found else 0.0
