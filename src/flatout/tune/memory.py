"""Checks whether the peak memory of a plan is too high, from the recorded steps of its runs.

``growth.py`` checks whether the memory of a plan grows without end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median

from flatout import knobs
from flatout.tune import formatting
from flatout.wire.record import Step

ALLOWED = 1.1
"""The peak memory that a plan may have by default, as a multiple of the bare program's."""

CONSTANT_BYTES = 256 * 2**20
"""A plan may in any case take this much more main memory than bare, unless the user allows less
than ``ALLOWED``. Some settings need a fixed amount, however small the program: the modules of
torch's compiler, which ``compile`` and ``replay`` import, take 80 to 120 MiB together with compiled
kernels, and the code that ``code_pages`` copies takes 20 to 100 MiB."""

FEWEST_PAIRS = 2
"""A plan is refused only if its peak is above the limit in at least this many pairs."""

CHECK_NAME = "memory"
"""The name of the check of a proof that says whether memory grows (``growth.py``)."""


def find_costly(settings: Mapping[str, str]) -> dict[str, str]:
    """Find the settings that need more memory by design (``Knob.memory_settings``).

    Raises:
        UnknownSettingError: there is no such knob.
    """
    return {
        name: setting
        for name, setting in settings.items()
        if setting in knobs.get(name).memory_settings
    }


def refusal(
    bare: Sequence[Sequence[Step]], plan: Sequence[Sequence[Step]], allowed: float
) -> str | None:
    """Return the reason why the peak memory of a plan is too high, as a clause.

    The result is ``None`` if the plan's peak is within the limit (``limit_bytes``), if the peak is
    above the limit in fewer than ``FEWEST_PAIRS`` pairs, or if memory was not measured.

    Args:
        bare, plan: the steps of each run of the bare program and of the plan, in pairs.
        allowed: the peak memory that the plan may have, as a multiple of bare's.
    """
    read_peak, bare_peak, plan_peak = find_peaks(bare, plan)
    if bare_peak is None or plan_peak is None:
        return None
    if plan_peak <= limit_bytes(bare_peak, allowed, read_peak):
        return None
    above = [
        of_plan > limit_bytes(of_bare, allowed, read_peak)
        for one, other in zip(bare, plan, strict=False)
        if (of_bare := _peak([one], read_peak)) and (of_plan := _peak([other], read_peak))
    ]
    if sum(above) < FEWEST_PAIRS:
        return None
    return (
        f"its peak memory is {plan_peak / bare_peak:.2f} times bare's "
        f"({formatting.memory(plan_peak)} against {formatting.memory(bare_peak)}; "
        f"--memory {math.ceil(10 * plan_peak / bare_peak) / 10:.1f} would allow it)"
    )


def peak_rss_bytes(runs: Sequence[Sequence[Step]]) -> int | None:
    """Return the peak memory of the main process, or of all ranks together; the median of the runs.

    The result is ``None`` if this memory was not measured.
    """
    return _peak(runs, _read_rss_peak)


def peak_device_bytes(runs: Sequence[Sequence[Step]]) -> int | None:
    """Return the peak memory on the accelerator; the median of the runs.

    The result is ``None`` if the program uses no accelerator, or if this memory was not measured.
    """
    return _peak(runs, _read_device_peak)


def find_peaks(
    bare: Sequence[Sequence[Step]], plan: Sequence[Sequence[Step]]
) -> tuple[Callable[[Step], int | None], int | None, int | None]:
    """Find out which memory counts, and return its peaks.

    Returns a function that reads this memory's peak from the record of a step, and the peaks of
    bare and plan.

    If the program uses an accelerator, the accelerator's memory counts. Otherwise main memory
    counts: that of the main process, or of all ranks together.
    """
    peaks = peak_device_bytes(bare), peak_device_bytes(plan)
    if None not in peaks:
        return _read_device_peak, *peaks
    return _read_rss_peak, peak_rss_bytes(bare), peak_rss_bytes(plan)


def limit_bytes(bare_peak: int, allowed: float, read_peak: Callable[[Step], int | None]) -> float:
    """Return the peak memory that a plan may have, in bytes.

    Args:
        bare_peak: the peak of the bare program.
        allowed: the peak that the plan may have, as a multiple of bare's. Less than ``ALLOWED``
            means that the user allows no ``CONSTANT_BYTES`` either.
        read_peak: reads the memory that counts, see ``find_peaks``. ``CONSTANT_BYTES`` applies to
            main memory only, because what a process imports takes no memory on an accelerator.
    """
    limit = allowed * bare_peak
    if allowed >= ALLOWED and read_peak is _read_rss_peak:
        limit = max(limit, bare_peak + CONSTANT_BYTES)
    return limit


def _peak(runs: Sequence[Sequence[Step]], read_peak: Callable[[Step], int | None]) -> int | None:
    """Return the median over the runs of the largest value that ``read_peak`` finds in a run."""
    peaks = [max((read_peak(step) or 0 for step in steps), default=0) for steps in runs]
    known = [peak for peak in peaks if peak]
    return round(median(known)) if known else None


def _read_rss_peak(step: Step) -> int | None:
    return step.peak_rss_bytes


def _read_device_peak(step: Step) -> int | None:
    return step.peak_device_bytes
