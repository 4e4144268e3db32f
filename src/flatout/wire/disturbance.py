"""Whether a job had its CPUs for itself, from readings of CPU time (``machine/usage.py``).

Two shares describe a stretch of time. *Taken* is the share of the CPU time of the allowed CPUs that
neither the job used nor was idle: other processes, the kernel, and the host of a virtual machine
used it. *Lost* is the share of wall time for which threads of the job wanted a CPU and did not get
it because of others. Others may take much without loss (free CPUs, jobs of idle priority), so what
was lost decides whether a time counts; what was taken is what the user is told.

A job whose threads outnumber its CPUs waits for itself. So the lost time is at most the time that
others have taken, without what the kernel and its services always take (``NOISE_SHARE``).

What accounting does not show (a lower clock, a hyper-thread beside this one, a host that hides what
it takes) may show in the time of a fixed piece of work right before the stretch. It does not show
time slices: beside a test suite it stayed the same within 20 %, while steps took sixty times as
long.

The functions are pure. The agent, the controller and the benchmarks use the same ones.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from flatout.wire.lines import CpuUsage
from flatout.wire.ratios import Block

if TYPE_CHECKING:
    from flatout.wire.record import UsageBeside

LOST_LIMIT = 0.1
"""The share of wall time that may be lost in a stretch that counts. On a machine that does nothing
else, up to 0.07 is lost in blocks of 20 ms; beside other work, 0.4 and more."""

TAKEN_LIMIT = 0.1
"""The share of the CPUs that others may take in a stretch that is called quiet."""

NOISE_SHARE = 0.005
"""The share of each CPU that is never free, on a machine that does nothing else. On many CPUs it
adds up to a large part of the wall time, although it delays nothing for long."""

SLOWNESS_LIMIT = 2.5
"""How many times longer than usual the fixed work may take before a stretch that counts. Where the
process has just waited, it takes up to 1.8 times as long on a quiet machine."""

WINDOW_S = 0.5
"""The shortest time over which the time of others is computed. ``/proc/stat`` counts in steps of 10
ms for each CPU."""


class Stretch(NamedTuple):
    """What happened on the CPUs of a job in a stretch of time.

    Attributes:
        taken: the share of the CPUs that others took; ``None``: not measured.
        lost: the share of the wall time that the job lost; ``None``: not measured.
        slowness: how many times longer than usual a fixed piece of work took; ``None``: not
            measured.
    """

    taken: float | None
    lost: float | None
    slowness: float | None = None

    @property
    def is_disturbed(self) -> bool:
        """Whether the time of this stretch does not count."""
        is_slow = self.slowness is not None and self.slowness > SLOWNESS_LIMIT
        return is_slow or (self.lost is not None and self.lost > LOST_LIMIT)

    @property
    def is_quiet(self) -> bool:
        """Whether others are known to have left the CPUs alone."""
        return is_little(self.taken) and not self.is_disturbed


def is_little(taken: float | None) -> bool:
    """Return whether a share of the CPUs is known to be so little that the CPUs are quiet."""
    return taken is not None and taken <= TAKEN_LIMIT


NOT_MEASURED = Stretch(None, None)


@dataclass(frozen=True)
class _Curve:
    """A total over time, linear between its points."""

    at_s: list[float]
    total_s: list[float]

    @classmethod
    def of(
        cls, usage: Sequence[CpuUsage], read: Callable[[CpuUsage], float | None], shift_s: float = 0
    ) -> _Curve | None:
        """Return the curve of a total; ``None`` if it was not measured in some reading."""
        values = [(one.at_s + shift_s, read(one)) for one in usage]
        known = [(at_s, value) for at_s, value in values if value is not None]
        if len(known) < 2 or len(known) < len(values):
            return None
        return cls([at_s for at_s, _ in known], [value for _, value in known])

    def at(self, at_s: float) -> float:
        """Return the total at a time; before the first point and after the last, it is constant."""
        after = bisect.bisect_left(self.at_s, at_s)
        if after == 0:
            return self.total_s[0]
        if after == len(self.at_s):
            return self.total_s[-1]
        begin_s, end_s = self.at_s[after - 1], self.at_s[after]
        share = (at_s - begin_s) / (end_s - begin_s) if end_s > begin_s else 1.0
        return self.total_s[after - 1] + share * (self.total_s[after] - self.total_s[after - 1])

    def grown(self, start_s: float, end_s: float) -> float:
        """Return by how much the total grew; a thread that has ended takes its part with it."""
        return max(self.at(end_s) - self.at(start_s), 0.0)


class History:
    """What happened on the CPUs of a job, from the readings of its processes.

    Args:
        usage: the readings of one process, in order.
        beside: those of other processes that belong to the job, or that wait while this one runs.
    """

    def __init__(self, usage: Sequence[CpuUsage], beside: Sequence[UsageBeside] = ()) -> None:
        self._cpus = usage[-1].cpus if usage else 0
        self._start_s = usage[0].at_s if usage else 0.0
        self._end_s = usage[-1].at_s if usage else 0.0
        own = [_Curve.of(usage, lambda one: one.own_s)]
        own += [_Curve.of(other.usage, lambda one: one.own_s, other.shift_s) for other in beside]
        self._own = [curve for curve in own if curve is not None]
        self._idle = _Curve.of(usage, lambda one: one.idle_s)
        self._stolen = _Curve.of(usage, lambda one: one.stolen_s)
        self._waited = _Curve.of(usage, lambda one: one.waited_s)
        self._pressure = _Curve.of(usage, lambda one: one.pressure_s)
        self._throttled = _Curve.of(usage, lambda one: one.throttled_s)
        self._works = [(one.at_s, one.work_us) for one in usage if one.work_us is not None]
        all_us = sorted(
            one.work_us
            for usages in (usage, *(other.usage for other in beside))
            for one in usages
            if one.work_us is not None
        )
        self._usual_work_us = all_us[len(all_us) // 4] if all_us else None

    def between(self, start_s: float, end_s: float) -> Stretch:
        """Return what happened between two moments, in seconds since the header of the process.

        The stretch is cut to the time of the readings.
        """
        start_s, end_s = max(start_s, self._start_s), min(end_s, self._end_s)
        if end_s <= start_s:
            return NOT_MEASURED
        slowness = self._slowness(start_s)
        if self._idle is None:
            return Stretch(None, None, slowness)
        taken = self._taken(start_s, end_s)
        waited_s = self._waited_s(start_s, end_s)
        lost = max(taken - NOISE_SHARE * self._cpus, 0.0)
        if waited_s is not None:
            lost = min(waited_s / (end_s - start_s), lost)
        return Stretch(min(taken / self._cpus, 1.0), lost, slowness)

    def _taken(self, start_s: float, end_s: float) -> float:
        """Return how many CPUs others used in the middle of a stretch, on average."""
        missing_s = max(WINDOW_S - (end_s - start_s), 0.0)
        start_s = max(start_s - missing_s / 2, self._start_s)
        end_s = min(end_s + missing_s / 2, self._end_s)
        assert self._idle is not None
        used_s = self._cpus * (end_s - start_s) - self._idle.grown(start_s, end_s)
        own_s = sum(curve.grown(start_s, end_s) for curve in self._own)
        return max(used_s - own_s, 0.0) / (end_s - start_s)

    def _slowness(self, at_s: float) -> float | None:
        """Return the time of the last fixed piece of work before a moment, relative to the usual
        one: the lower quartile, since others can only make it slower."""
        number = bisect.bisect_right(self._works, (at_s, math.inf))
        if self._usual_work_us is None or number == 0:
            return None
        return self._works[number - 1][1] / self._usual_work_us

    def _waited_s(self, start_s: float, end_s: float) -> float | None:
        """Return how long the job may have waited for others, in seconds.

        Threads that a quota stops do not wait for others. While the host runs something else, the
        guest's clocks of waiting stand still. Where the threads of the job tell nothing, it is the
        time in which any thread on the machine waited.
        """
        curve = self._waited or self._pressure
        if curve is None:
            return None
        waited_s = curve.grown(start_s, end_s)
        if self._throttled is not None:
            waited_s = max(waited_s - self._throttled.grown(start_s, end_s), 0.0)
        if self._stolen is not None:
            waited_s += self._stolen.grown(start_s, end_s)
        return waited_s


def drop_disturbed(blocks: Sequence[Block], history: History) -> list[Block]:
    """Return the blocks of a comparison inside one process that were not disturbed."""
    return [
        block
        for block in blocks
        if block.start_s is None
        or block.end_s is None
        or not history.between(block.start_s, block.end_s).is_disturbed
    ]


def mean_taken(blocks: Sequence[Block], history: History) -> float | None:
    """Return the share of the CPUs that others took during some blocks, on average.

    The result is ``None`` if it was not measured.
    """
    known = [
        taken
        for block in blocks
        if block.start_s is not None
        and block.end_s is not None
        and (taken := history.between(block.start_s, block.end_s).taken) is not None
    ]
    return fmean(known) if known else None
