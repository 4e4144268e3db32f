"""How much CPU time this job, and everything else on its CPUs, has used so far.

A reading (``read``) costs some ten microseconds, and some ten more for each thread. All its times
are totals since a fixed moment, so that two readings tell what happened between them. A value that
the system does not tell is ``None``, as on macOS. Controller and agent import this module, which
imports the standard library only.

Sources: proc_stat(5); proc_pid_task(5) for ``children``; kernel documentation, "Scheduler
Statistics" for ``schedstat``, "PSI - Pressure Stall Information", "Control Group v2" and "CFS
Bandwidth Control" for ``cpu.stat``; getrusage(2).
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from typing import NamedTuple

from flatout.machine import system

_IDLE, _WAITING_FOR_DISK, _STOLEN = 3, 4, 7
"""The places of these times in a line of ``/proc/stat``."""


class Usage(NamedTuple):
    """One reading.

    Attributes:
        at_ns: when it was taken, by ``time.perf_counter_ns``.
        cpus: the number of CPUs that the threads of this process may run on.
        own_s: the CPU time of this process, of its children that have ended, and of its living
            descendants.
        waited_s: how long their living threads were ready to run while no CPU ran them.
        preemptions: how often a thread of this process lost its CPU to another one.
        idle_s: how long these CPUs had nothing to do, added up over them.
        stolen_s: how long the host of this virtual machine ran something else on them.
        pressure_s: how long any thread on the machine was ready to run while no CPU ran it.
        throttled_s: how long the CPU quota of this process's control groups stopped it.
    """

    at_ns: int
    cpus: int
    own_s: float
    waited_s: float | None
    preemptions: int | None
    idle_s: float | None
    stolen_s: float | None
    pressure_s: float | None
    throttled_s: float | None


class _Threads(NamedTuple):
    """What the threads of some processes have used so far."""

    ran_s: float
    waited_s: float


def read() -> Usage:
    """Take a reading for this process and its descendants."""
    threads = [int(name) for name in _entries("/proc/self/task")]
    processors = _allowed_processors(threads)
    waited_s = None
    descendants = _Threads(0.0, 0.0)
    of_process = _read_threads("self", threads)
    if of_process is not None:
        descendants = _read_descendants("self", threads)
        waited_s = of_process.waited_s + descendants.waited_s
    own_s, preemptions = _read_process_times()
    idle_s, stolen_s = parse_processor_times(_text("/proc/stat"), processors)
    return Usage(
        at_ns=time.perf_counter_ns(),
        cpus=len(processors),
        own_s=own_s + descendants.ran_s,
        waited_s=waited_s,
        preemptions=preemptions,
        idle_s=idle_s,
        stolen_s=stolen_s,
        pressure_s=parse_pressure_s(_text("/proc/pressure/cpu")),
        throttled_s=system.cpu_throttled_s(),
    )


def taken_between(before: Usage, after: Usage) -> float | None:
    """Return the share of the CPUs that others took between two readings.

    The result is ``None`` if it was not measured.
    """
    available_s = after.cpus * (after.at_ns - before.at_ns) / 1e9
    if before.idle_s is None or after.idle_s is None or available_s <= 0:
        return None
    idle_s, own_s = after.idle_s - before.idle_s, after.own_s - before.own_s
    return min(max(available_s - idle_s - own_s, 0.0) / available_s, 1.0)


def throttled_between(before: Usage, after: Usage) -> float | None:
    """Return the share of the time between two readings for which a CPU quota stopped this process,
    at most 1; ``None`` if it was not measured."""
    between_s = (after.at_ns - before.at_ns) / 1e9
    if before.throttled_s is None or after.throttled_s is None or between_s <= 0:
        return None
    return min((after.throttled_s - before.throttled_s) / between_s, 1.0)


def fixed_work_us() -> float:
    """Return how long a fixed piece of arithmetic takes on one CPU, in microseconds.

    It is the shortest of three times, so that being preempted does not count. It tells whether the
    CPU itself is slower than before: its clock, a hyper-thread beside it, a host that does not say
    what it takes.
    """
    best_ns = float("inf")
    for _ in range(3):
        began_ns = time.perf_counter_ns()
        total = 0
        for number in range(2000):
            total += number * number
        best_ns = min(best_ns, time.perf_counter_ns() - began_ns)
    return best_ns / 1e3


def parse_processor_times(
    stat: str, processors: Collection[int]
) -> tuple[float | None, float | None]:
    """Return how long some CPUs were idle, and how long the host kept them, in seconds.

    The time of waiting for a disk counts as idle: the CPU could have run something. Both are
    ``None`` if the text does not tell them; some sandboxes give zeros for every CPU.

    Args:
        stat: the content of ``/proc/stat``.
        processors: the numbers of the CPUs.
    """
    rows = {
        int(words[0][3:]): [int(word) for word in words[1:]]
        for words in map(str.split, stat.splitlines())
        if words and words[0].startswith("cpu") and words[0][3:].isdecimal()
    }
    wanted = [rows.get(number, []) for number in processors]
    if not wanted or not all(len(row) > _STOLEN and any(row) for row in wanted):
        return None, None
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    idle = sum(row[_IDLE] + row[_WAITING_FOR_DISK] for row in wanted)
    return idle * tick_s, sum(row[_STOLEN] for row in wanted) * tick_s


def parse_pressure_s(pressure: str) -> float | None:
    """Return the total of the line ``some`` of ``/proc/pressure/cpu``, in seconds."""
    for line in pressure.splitlines():
        words = line.split()
        if words[:1] == ["some"] and words[-1].startswith("total="):
            return int(words[-1].removeprefix("total=")) / 1e6
    return None


def _allowed_processors(threads: Collection[int]) -> set[int]:
    """Return the CPUs that any thread of this process may run on.

    OpenMP may bind each thread, the main one among them, to a CPU of its own.
    """
    if not hasattr(os, "sched_getaffinity"):
        return set(range(os.cpu_count() or 1))
    allowed = set(os.sched_getaffinity(0))
    for thread in threads:
        try:
            allowed |= os.sched_getaffinity(thread)
        except OSError:
            continue  # it has ended
    return allowed


def _read_process_times() -> tuple[float, int | None]:
    """Return the CPU time of this process and of its children that have ended, in seconds, and how
    often it was preempted."""
    try:
        import resource
    except ImportError:  # Windows
        return time.process_time(), None
    own, ended = (
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    used_s = own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime
    return used_s, own.ru_nivcsw


def _read_threads(pid: int | str, threads: Collection[int]) -> _Threads | None:
    """Return what the threads of a process have used; ``None`` if it cannot be read."""
    lines = [_text(f"/proc/{pid}/task/{thread}/schedstat") for thread in threads]
    words = [line.split() for line in lines if line]
    if not words or any(len(one) < 2 for one in words):
        return None
    return _Threads(sum(int(w[0]) for w in words) / 1e9, sum(int(w[1]) for w in words) / 1e9)


def _read_descendants(pid: int | str, threads: Collection[int]) -> _Threads:
    """Return what the living descendants of a process have used."""
    ran_s = waited_s = 0.0
    for child in _children(pid, threads):
        of_child = [int(name) for name in _entries(f"/proc/{child}/task")]
        for used in (_read_threads(child, of_child), _read_descendants(child, of_child)):
            if used is not None:
                ran_s += used.ran_s
                waited_s += used.waited_s
    return _Threads(ran_s, waited_s)


def _children(pid: int | str, threads: Collection[int]) -> Iterator[int]:
    for thread in threads:
        for word in _text(f"/proc/{pid}/task/{thread}/children").split():
            yield int(word)


def _entries(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _text(path: str) -> str:
    """Return the content of a file of the kernel's; empty if it cannot be read.

    ``Path.read_text`` would take three times as long.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return ""
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts).decode("ascii", "replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)
