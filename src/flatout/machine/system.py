"""The resources of this machine, and how much of them this process may use, from Linux's files.

Control groups nest, so a limit applies if it is set on the process's group or any group above it.
A value that cannot be read is ``None``. Controller and agent import this module, which imports the
standard library only.

Sources: kernel documentation, "Control Group v2", "Memory Resource Controller", "CFS Bandwidth
Control"; proc_meminfo(5), proc_cpuinfo(5), cgroups(7).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where the cgroup file systems are mounted."""


def cpu_fields(file: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Return the fields of the first processor in ``/proc/cpuinfo``, none if it cannot be read."""
    fields: dict[str, str] = {}
    for line in (text(file) or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
        elif fields:
            break  # the next processor
    return fields


def cpu_quota(root: Path = CGROUPS, groups: str | None = None) -> float | None:
    """Return the CPU quota in cores, ``None`` if there is no limit.

    Args:
        root: where the cgroup file systems are mounted.
        groups: content of ``/proc/self/cgroup``.
    """
    return _smallest("cpu", _quota_v2, _quota_v1, root, groups)


def cpu_throttled_s(root: Path = CGROUPS, groups: str | None = None) -> float | None:
    """Return how long CPU quotas have stopped this process's control groups so far, in seconds.

    The result is ``None`` if no group tells it. For the arguments see ``cpu_quota``.
    """
    groups = text(Path("/proc/self/cgroup")) if groups is None else groups
    found = [_throttled_s(*group) for group in _groups_with_cpu_times(root, groups or "")]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) if known else None


@functools.cache
def _groups_with_cpu_times(root: Path, groups: str) -> list[tuple[bool, Path]]:
    """Return the groups that tell how long they were stopped, as ``_groups`` yields them."""
    return [group for group in _groups("cpu", root, groups) if _throttled_s(*group) is not None]


def memory_limit_bytes(root: Path = CGROUPS, groups: str | None = None) -> int | None:
    """Return the memory that the control groups allow, ``None`` if there is no limit.

    In version 1, the limit is larger than any memory if none is set. For the arguments see
    ``cpu_quota``.
    """
    limit = _smallest(
        "memory",
        lambda folder: _integer(folder / "memory.max"),
        lambda folder: _integer(folder / "memory.limit_in_bytes"),
        root,
        groups,
    )
    return None if limit is None else int(limit)


def available_bytes(root: Path = CGROUPS, groups: str | None = None) -> int | None:
    """Return the memory that is free without swapping, within the limits of the control groups."""
    free = _smallest(
        "memory",
        lambda folder: _free(folder, "memory.max", "memory.current", "inactive_file"),
        lambda folder: _free(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        ),
        root,
        groups,
    )
    machine_kib = _numbers(Path("/proc/meminfo")).get("MemAvailable:")
    machine_bytes = None if machine_kib is None else machine_kib * 1024
    return min((max(int(s), 0) for s in (free, machine_bytes) if s is not None), default=None)


def _smallest(
    controller: str,
    read_v2: Callable[[Path], float | None],
    read_v1: Callable[[Path], float | None],
    root: Path,
    groups: str | None,
) -> float | None:
    """Return the smallest limit of a controller in this process's group and the groups above it."""
    groups = text(Path("/proc/self/cgroup")) if groups is None else groups
    limits = [
        limit
        for is_v2, folder in _groups(controller, root, groups or "")
        if (limit := (read_v2 if is_v2 else read_v1)(folder)) is not None
    ]
    return min(limits, default=None)


def _groups(controller: str, root: Path, groups: str) -> Iterator[tuple[bool, Path]]:
    """Yield the folders of this process's groups and of all groups above them, each with whether it
    is of version 2.

    In a container, the path may be that of the host, and not exist inside. The folders above it,
    which exist, are used then.
    """
    for line in groups.splitlines():
        _, first, rest = line.partition(":")
        controllers, second, path = rest.partition(":")
        if not first or not second or (controllers and controller not in controllers.split(",")):
            continue
        base = root / controller if controllers else root
        folder = base / os.path.normpath(f"/{path}").lstrip("/")
        yield not controllers, folder
        while folder != base and base in folder.parents:
            folder = folder.parent
            yield not controllers, folder


def _quota_v2(folder: Path) -> float | None:
    words = (text(folder / "cpu.max") or "").split()
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not int(words[1]):
        return None
    return int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota = _integer(folder / "cpu.cfs_quota_us")
    period = _integer(folder / "cpu.cfs_period_us")
    return quota / period if quota and period else None


def _throttled_s(is_v2: bool, folder: Path) -> float | None:
    numbers = _numbers(folder / "cpu.stat")
    used = numbers.get("throttled_usec" if is_v2 else "throttled_time")
    return None if used is None else used / (1e6 if is_v2 else 1e9)


def _free(folder: Path, limit_file: str, used_file: str, reclaimable: str) -> int | None:
    """Return how much memory the limit of a group leaves; cached files count as free."""
    limit, used = _integer(folder / limit_file), _integer(folder / used_file)
    if limit is None or used is None:
        return None
    return limit - used + _numbers(folder / "memory.stat").get(reclaimable, 0)


def _numbers(file: Path) -> dict[str, int]:
    """Return the numbers of a file whose lines are a name and a number."""
    pairs = (line.split()[:2] for line in (text(file) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _integer(file: Path) -> int | None:
    word = (text(file) or "").strip()
    return int(word) if word.isdecimal() else None


def text(file: Path) -> str | None:
    """Return the content of a file, ``None`` if it cannot be read."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return None
