"""Writing readings of CPU time to the record.

They show later whether the job had its CPUs for itself (``wire/disturbance.py``).
"""

from __future__ import annotations

import math
import time

from flatout.intercept.containment import OnFailure, attempt
from flatout.machine import usage
from flatout.wire.lines import CpuUsage
from flatout.wire.writer import FLUSH_SECONDS, RecordWriter

LONGEST_PERIOD_S = 10.0
"""The longest time between two readings of a long run, in seconds."""

PERIOD_SHARE = 0.01
"""The time between two readings, as a share of the run's time so far: a day has 10,000 readings."""

MOST_COST = 0.002
"""The share of the time that readings may take: a program with many threads is read less often."""


class UsageLog:
    """The ``cpu`` lines of a record. After a reading that fails there are no more.

    Args:
        record: the record of this process.
        on_failure: called with the exception of a reading that has failed.
    """

    def __init__(self, record: RecordWriter, on_failure: OnFailure) -> None:
        self._record = record
        self._on_failure = on_failure
        self._due_ns: float = 0

    def restart(self) -> None:
        """Begin anew, in the child of a fork."""
        self._due_ns = 0

    def note_if_due(self, is_measured: bool) -> None:
        """Take a reading, unless the last one was a short time ago.

        Args:
            is_measured: whether steps are being measured, so that readings are not thinned out.
        """
        began_ns = time.perf_counter_ns()
        if began_ns < self._due_ns or self.note() is None:
            return
        ended_ns = time.perf_counter_ns()
        period_ns = 0.9 * FLUSH_SECONDS * 1e9  # a reading is due at each write
        if not is_measured:
            age_ns = ended_ns - self._record.started_ns
            period_ns = max(period_ns, min(PERIOD_SHARE * age_ns, LONGEST_PERIOD_S * 1e9))
        self._due_ns = began_ns + max(period_ns, (ended_ns - began_ns) / MOST_COST)

    def note(self, with_work: bool = False) -> CpuUsage | None:
        """Take a reading now; return it, or ``None`` if there is none.

        Args:
            with_work: whether to measure a fixed piece of work too, which takes a few hundred
                microseconds.
        """
        if self._due_ns == math.inf:
            return None
        due_ns, self._due_ns = self._due_ns, math.inf
        line: CpuUsage | None = attempt(self._on_failure, self._read, with_work)
        if line is not None:
            self._due_ns = due_ns
        return line

    def _read(self, with_work: bool) -> CpuUsage:
        work_us = usage.fixed_work_us() if with_work else None
        now = usage.read()
        line = CpuUsage(
            at_s=round(self._record.seconds(now.at_ns), 6),
            cpus=now.cpus,
            own_s=round(now.own_s, 6),
            waited_s=_rounded(now.waited_s),
            preemptions=now.preemptions,
            idle_s=_rounded(now.idle_s),
            stolen_s=_rounded(now.stolen_s),
            pressure_s=_rounded(now.pressure_s),
            throttled_s=_rounded(now.throttled_s),
            work_us=_rounded(work_us),
        )
        self._record.write(line)
        return line


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
