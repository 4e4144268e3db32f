"""Whether a plan needs too much memory. The functions are pure functions of recorded steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

from flatout.tune import figures
from flatout.wire.record import Step

ALLOWED = 1.1
"""Peak memory that a plan may have, as a multiple of the bare program's, by default."""

LEAK_STEPS = 2000
"""Steps after which memory that keeps growing must still be within what is allowed."""

FEWEST_STEPS = 16
"""Fewest steps of a run whose growth is looked at."""


def refusal(
    bare: Sequence[Sequence[Step]], plan: Sequence[Sequence[Step]], allowed: float
) -> str | None:
    """Why a plan needs too much memory, one clause; ``None``: it does not, or it was not measured.

    If the program uses an accelerator, the accelerator's memory counts, else that of the main
    process.

    Args:
        bare, plan: steps of each run.
        allowed: peak memory that the plan may have, as a multiple of bare's.
    """
    bare_peak, plan_peak = peak_device_bytes(bare), peak_device_bytes(plan)
    if bare_peak is None or plan_peak is None:
        bare_peak, plan_peak = peak_rss_bytes(bare), peak_rss_bytes(plan)
    if bare_peak is None or plan_peak is None:
        return None
    if plan_peak > allowed * bare_peak:
        return (
            f"its peak memory is {plan_peak / bare_peak:.2f} times bare's "
            f"({figures.memory(plan_peak)} against {figures.memory(bare_peak)}; "
            f"--memory {math.ceil(10 * plan_peak / bare_peak) / 10:.1f} would allow it)"
        )
    growth = _growth_bytes(plan) - _growth_bytes(bare)
    if bare_peak + growth * LEAK_STEPS > allowed * bare_peak and growth > 0:
        return f"its memory grows by {growth / 1024:.0f} KiB a step and does not stop"
    return None


def peak_rss_bytes(runs: Sequence[Sequence[Step]]) -> int | None:
    """The peak of the main process, the median of the runs; ``None``: not measured."""
    return _median(steps[-1].peak_rss_bytes for steps in runs if steps)


def peak_device_bytes(runs: Sequence[Sequence[Step]]) -> int | None:
    """The peak on the accelerator, the median of the runs; ``None``: none is used or measured."""
    return _median(
        max((step.peak_device_bytes or 0 for step in steps), default=0) for steps in runs
    )


def _median(peaks: Iterable[int | None]) -> int | None:
    known = [peak for peak in peaks if peak]
    return round(median(known)) if known else None


def _growth_bytes(runs: Sequence[Sequence[Step]]) -> float:
    """The growth per step that lasted through the third and the last quarter of a run, the median
    of the runs."""
    found = []
    for steps in runs:
        peaks = [step.peak_rss_bytes for step in steps]
        known = [peak for peak in peaks if peak is not None]
        if len(known) < FEWEST_STEPS:
            continue
        quarter = len(known) // 4
        third = (known[-1 - quarter] - known[-1 - 2 * quarter]) / quarter
        last = (known[-1] - known[-1 - quarter]) / quarter
        found.append(min(third, last))
    return median(found) if found else 0.0
