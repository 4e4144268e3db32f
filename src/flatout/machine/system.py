"""What the system says of this machine, and of the part of it that this process may use.

Control groups nest: a limit counts wherever it stands on the way up from the process's own group.
What cannot be read is ``None``. Linux; standard library only: both halves load this.

Sources: kernel documentation, "Control Group v2", "Memory Resource Controller", "CFS Bandwidth
Control"; proc_meminfo(5), proc_cpuinfo(5), cgroups(7).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
"""Where the cgroup file systems are mounted."""


def cpu_fields(file: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What ``/proc/cpuinfo`` says of the first processor; empty where there is none."""
    fields: dict[str, str] = {}
    for line in (text(file) or "").splitlines():
        name, separator, value = line.partition(":")
        if separator:
            fields.setdefault(name.strip(), value.strip())
        elif fields:
            break  # the next processor
    return fields


def cpu_quota(root: Path = CGROUPS, own: str | None = None) -> float | None:
    """CPU quota in cores; ``None``: there is no limit.

    Args:
        root: where the cgroup file systems are mounted.
        own: content of ``/proc/self/cgroup``.
    """
    return _smallest("cpu", _quota_v2, _quota_v1, root, own)


def memory_limit_bytes(root: Path = CGROUPS, own: str | None = None) -> int | None:
    """Memory that the control groups allow; ``None``: there is no limit. Arguments: ``cpu_quota``.

    In version 1, no limit is a number that is larger than any memory.
    """
    limit = _smallest(
        "memory",
        lambda folder: _integer(folder / "memory.max"),
        lambda folder: _integer(folder / "memory.limit_in_bytes"),
        root,
        own,
    )
    return None if limit is None else int(limit)


def available_bytes(root: Path = CGROUPS, own: str | None = None) -> int | None:
    """Memory that can be had without swapping, on this machine and within the control groups."""
    free = _smallest(
        "memory",
        lambda folder: _free(folder, "memory.max", "memory.current", "inactive_file"),
        lambda folder: _free(
            folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        ),
        root,
        own,
    )
    of_machine_kib = _words(Path("/proc/meminfo")).get("MemAvailable:")
    of_machine = None if of_machine_kib is None else of_machine_kib * 1024
    return min((max(int(s), 0) for s in (free, of_machine) if s is not None), default=None)


def _smallest(
    controller: str,
    of_v2: Callable[[Path], float | None],
    of_v1: Callable[[Path], float | None],
    root: Path,
    own: str | None,
) -> float | None:
    """The smallest limit of a controller on the way up from this process's group."""
    own = text(Path("/proc/self/cgroup")) if own is None else own
    limits = [
        limit
        for is_v2, folder in _groups(controller, root, own or "")
        if (limit := (of_v2 if is_v2 else of_v1)(folder)) is not None
    ]
    return min(limits, default=None)


def _groups(controller: str, root: Path, own: str) -> Iterator[tuple[bool, Path]]:
    """The folders of this process's groups, each with all above it: of version 2, and of 1.

    A container may see the path of its group from outside, where there is nothing on the inside:
    then what is above counts.
    """
    for line in own.splitlines():
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


def _free(folder: Path, limit_file: str, used_file: str, reclaimable: str) -> int | None:
    """What the limit of a group leaves; cached files make room when they must."""
    limit, used = _integer(folder / limit_file), _integer(folder / used_file)
    if limit is None or used is None:
        return None
    return limit - used + _words(folder / "memory.stat").get(reclaimable, 0)


def _words(file: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    pairs = (line.split()[:2] for line in (text(file) or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _integer(file: Path) -> int | None:
    word = (text(file) or "").strip()
    return int(word) if word.isdecimal() else None


def text(file: Path) -> str | None:
    """What is in a file, ``None`` where it cannot be read."""
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return None
