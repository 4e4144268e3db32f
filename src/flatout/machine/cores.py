"""Shares the cores of this machine out to processes that work side by side.

Sources: kernel documentation, "CPU topology info is exported via sysfs" and ``sysfs-devices-node``.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from flatout.machine.system import text

DEVICES = Path("/sys/devices/system")
"""Where the kernel describes processors and NUMA nodes."""

Node = list[list[int]]
"""The physical cores of a NUMA node, each a list of its logical processors."""


def allowed_processors() -> list[int]:
    """The logical processors that this process may run on, by number."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def nodes(processors: Collection[int], root: Path = DEVICES) -> list[Node]:
    """Sort logical processors into NUMA nodes and physical cores.

    Args:
        processors: numbers of those that may be used.
        root: where the kernel describes them. What it does not describe there is one node, each
            processor a core of its own.
    """
    node_of = {
        processor: int(folder.name.removeprefix("node"))
        for folder in (root / "node").glob("node[0-9]*")
        for processor in _numbers(text(folder / "cpulist"))
    }
    cores: dict[int, dict[int, list[int]]] = {}
    for processor in sorted(processors):
        siblings = text(root / f"cpu/cpu{processor}/topology/thread_siblings_list")
        core = min(_numbers(siblings), default=processor)
        cores.setdefault(node_of.get(processor, 0), {}).setdefault(core, []).append(processor)
    return [list(cores[node].values()) for node in sorted(cores)]


def share_out(found: Sequence[Node], shares: int) -> list[list[int]]:
    """Share cores out in equal, disjoint parts.

    All parts have the same number of processors, because the number of threads decides how sums are
    rounded, and some cores may be left over. A part lies in one node where that is possible. If
    there are more parts than cores, each has one core, which several of them share.

    Args:
        found: what ``nodes`` returns.
        shares: the number of parts.

    Returns the logical processors of each part.
    """
    every = [core for node in found for core in node]
    if len(every) < shares:
        parts = [[every[number % len(every)]] for number in range(shares)]
    else:
        size = len(every) // shares
        parts, left = [], []
        for node in found:
            inside = len(node) // size * size
            parts += [node[at : at + size] for at in range(0, inside, size)]
            left += node[inside:]
        parts += [left[at : at + size] for at in range(0, len(left) - size + 1, size)]
    flat = [[processor for core in part for processor in core] for part in parts[:shares]]
    fewest = min(map(len, flat))
    return [part[:fewest] for part in flat]


def _numbers(listed: str | None) -> list[int]:
    """The numbers of a list of the kernel's, such as ``0-3,8``."""
    found: list[int] = []
    for entry in (listed or "").strip().split(","):
        first, _, last = entry.partition("-")
        if first.isdecimal():
            found.extend(range(int(first), int(last or first) + 1))
    return found
