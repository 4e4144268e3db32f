"""Does the plan need more memory? Pure functions of recorded steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from flatout.record import Step

ALLOWED = 1.1
"""Times the bare program's peak, unless the user allows more."""

LEAK_STEPS = 2000
"""Steps after which a growth that goes on must still be within what is allowed."""

FEWEST_STEPS = 16
"""Below which growth is not looked at."""


def refusal(
    bare: Sequence[Sequence[Step]], plan: Sequence[Sequence[Step]], allowed: float
) -> str | None:
    """Why the plan needs too much, one clause; ``None``: it does not, or it was not measured.

    Args:
        bare, plan: steps of each run.
        allowed: peak of the plan over that of bare.
    """
    bare_peak, plan_peak = peak_bytes(bare), peak_bytes(plan)
    if bare_peak is None or plan_peak is None:
        return None
    if plan_peak > allowed * bare_peak:
        return (
            f"its peak memory is {plan_peak / bare_peak:.2f} times bare's "
            f"({_mib(plan_peak)} against {_mib(bare_peak)}; "
            f"--memory {math.ceil(10 * plan_peak / bare_peak) / 10:.1f} would allow it)"
        )
    growth = _growth_bytes(plan) - _growth_bytes(bare)
    if bare_peak + growth * LEAK_STEPS > allowed * bare_peak and growth > 0:
        return f"its memory grows by {growth / 1024:.0f} KiB a step and does not stop"
    return None


def peak_bytes(runs: Sequence[Sequence[Step]]) -> float | None:
    """Median peak of the runs, on the accelerator where there is one; ``None``: not measured."""
    peaks = [peak for steps in runs if (peak := _peak(steps)) is not None]
    return median(peaks) if peaks else None


def _peak(steps: Sequence[Step]) -> int | None:
    if not steps:
        return None
    on_device = [step.peak_device_bytes for step in steps if step.peak_device_bytes]
    return max(on_device) if on_device else steps[-1].peak_rss_bytes


def _growth_bytes(runs: Sequence[Sequence[Step]]) -> float:
    """Median growth a step that went on through the third and the last quarter of the runs."""
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


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:.0f} MiB"
