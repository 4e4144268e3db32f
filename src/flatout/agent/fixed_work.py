"""A fixed piece of work, whose time shows whether the machine itself is as fast as another time.

It runs about once a second, when the record is written. The time is CPU time of the thread: other
threads and processes that take the CPU do not lengthen it, but a lower clock and a busy sibling of
the core do.
"""

from __future__ import annotations

import hashlib
import time

from flatout.wire.lines import FixedWork

PERIOD_S = 1.0
"""The time between two measurements, at least."""

_DATA = bytes(64 * 1024)
"""Hashing this takes 40 to 300 microseconds, and it fits into the second-level cache."""


class FixedWorkTimer:
    """Measures the fixed piece of work whenever ``PERIOD_S`` have passed."""

    def __init__(self) -> None:
        self._due_ns = 0

    def measure_if_due(self) -> FixedWork | None:
        """Do the work if it is due, and return its time; ``None``: it is not due."""
        now_ns = time.perf_counter_ns()
        if now_ns < self._due_ns:
            return None
        self._due_ns = now_ns + round(PERIOD_S * 1e9)
        started_ns = time.thread_time_ns()
        hashlib.sha256(_DATA).digest()
        return FixedWork(round((time.thread_time_ns() - started_ns) / 1e3, 3))
