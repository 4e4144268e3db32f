"""How much of the CPUs that this process may use other programs take, from Linux's files.

A value that cannot be read is ``None``.

Sources: proc_stat(5), proc_pid_stat(5); kernel documentation, "Control Group v2" (``cpu.stat``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from flatout.machine import cores, system

STAT = Path("/proc/stat")

_IDLE = (3, 4)
"""The columns of a CPU in ``/proc/stat`` that are no work: idle, and waiting for a disk."""

_COUNTED_TWICE = 8
"""From this column on (guests), the times are part of earlier columns."""


@dataclass(frozen=True)
class Load:
    """The CPU time that was used up to a moment.

    Attributes:
        at_ns: the moment, as a ``time.perf_counter_ns`` reading.
        busy_s: CPU time of everything on the CPUs that this process may use, including what the
            host of a virtual machine has taken; ``None``: not known.
        own_s: CPU time of this process and all that it has started, as far as it is known.
        throttled_s: for how long CPU quotas have stopped this process's control groups, summed over
            CPUs; ``None``: there is no quota, or that is not known.
    """

    at_ns: int
    busy_s: float | None
    own_s: float
    throttled_s: float | None


@dataclass(frozen=True)
class Use:
    """The use of the CPUs between two moments.

    Attributes:
        cpus: the number of CPUs that this process may use.
        others_cpus: how many of them other programs used, on average; ``None``: not known.
        throttled_share: the share of the time for which a CPU quota stopped threads of this
            process, at most 1; ``None``: see ``Load``.
    """

    cpus: int
    others_cpus: float | None
    throttled_share: float | None


def take() -> Load:
    """Return the load of this machine up to now. It takes some milliseconds."""
    return Load(
        time.perf_counter_ns(),
        busy_seconds(system.text(STAT) or "", cores.allowed_processors()),
        _own_seconds(),
        system.throttled_s(),
    )


def between(first: Load, last: Load) -> Use:
    """Return the use of the CPUs between two loads, which must differ in time."""
    seconds = (last.at_ns - first.at_ns) / 1e9
    others = throttled = None
    if first.busy_s is not None and last.busy_s is not None:
        others = max(last.busy_s - first.busy_s - (last.own_s - first.own_s), 0.0) / seconds
    if first.throttled_s is not None and last.throttled_s is not None:
        throttled = min((last.throttled_s - first.throttled_s) / seconds, 1.0)
    return Use(len(cores.allowed_processors()), others, throttled)


def busy_seconds(stat: str, processors: Collection[int]) -> float | None:
    """Return the CPU time of everything on some processors; ``None``: it is not there.

    Args:
        stat: content of ``/proc/stat``.
        processors: the numbers of the processors.
    """
    ticks, seen = 0, 0
    for line in stat.splitlines():
        name, *columns = line.split()
        number = name.removeprefix("cpu")
        if name.startswith("cpu") and number.isdecimal() and int(number) in processors:
            counts = list(map(int, columns[:_COUNTED_TWICE]))
            ticks += sum(n for column, n in enumerate(counts) if column not in _IDLE)
            seen += 1
    return ticks / os.sysconf("SC_CLK_TCK") if seen == len(processors) else None


def _own_seconds() -> float:
    """Return the CPU time of this process, of its descendants, and of those that have ended and
    were waited for."""
    import psutil

    this = psutil.Process()
    processes = [this]
    with contextlib.suppress(psutil.Error):  # some end meanwhile
        processes += this.children(recursive=True)
    total = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            total += sum(process.cpu_times()[:4])  # own and awaited children's, user and system
    return total
