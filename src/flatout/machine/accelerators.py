"""Shares the accelerators of this machine out to processes that work side by side, by environment
variables. No driver is asked, because that is left to torch in the program.

Sources: "CUDA C++ Programming Guide" (``CUDA_VISIBLE_DEVICES``), ROCm's "GPU isolation techniques"
(``HIP_VISIBLE_DEVICES``), oneAPI's Level Zero specification (``ZE_AFFINITY_MASK``), and kernel
documentation of ``/sys/class/kfd`` and ``/sys/class/drm``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from flatout.machine.system import text

ROOT = Path("/")
"""Of the file systems in which drivers show their devices."""

_INTEL = "0x8086"
"""The vendor of PCI devices."""


def visible(variables: Mapping[str, str], root: Path = ROOT) -> dict[str, list[str]]:
    """Return the accelerators that programs may use: for each environment variable that hides
    accelerators, the parts of its value that name one each. Variables without any are left out.

    Args:
        variables: the environment. What it does not name is counted by the files of drivers.
        root: of the file systems in which they are.
    """
    found = {}
    for name, count in _COUNTS.items():
        number = count(root)
        given = variables.get(name)
        if name == _OF_AMD and given is None and number:
            # ROCm takes CUDA's variable too, and has one below it, by which devices are renumbered.
            given = variables.get(_OF_NVIDIA)
            below = variables.get("ROCR_VISIBLE_DEVICES")
            number = number if below is None else len(_read(below))
        names = list(map(str, range(number))) if given is None else _read(given)
        if names:
            found[name] = names
    return found


def _read(listed: str) -> list[str]:
    """Return what a variable names: what follows a word that names no device is not seen."""
    names = [part.strip() for part in listed.split(",")]
    return list(itertools.takewhile(lambda name: name and name not in _NO_DEVICE, names))


def share_out(found: Mapping[str, list[str]], number: int) -> dict[str, str]:
    """Return the environment variables by which a process sees one accelerator only.

    Args:
        found: what ``visible`` returns.
        number: of the process on this host, from 0. If there are more processes than accelerators,
            several of them have the same.
    """
    return {name: names[number % len(names)] for name, names in found.items()}


def count(found: Mapping[str, list[str]]) -> int:
    """Return the number of accelerators, of the kind of which there are most."""
    return max(map(len, found.values()), default=0)


def _count_nvidia(root: Path) -> int:
    folders = list((root / "proc/driver/nvidia/gpus").glob("*"))
    files = (root / "dev").glob("nvidia[0-9]*")
    return len(folders) or sum(bool(re.fullmatch(r"nvidia\d+", file.name)) for file in files)


def _count_amd(root: Path) -> int:
    """Return the number of nodes with SIMD units: the others are CPUs."""
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("*/properties")
    counts = (re.search(r"^simd_count (\d+)$", text(node) or "", re.MULTILINE) for node in nodes)
    return sum(found is not None and int(found[1]) > 0 for found in counts)


def _count_intel(root: Path) -> int:
    vendors = (root / "sys/class/drm").glob("renderD*/device/vendor")
    return sum((text(vendor) or "").strip() == _INTEL for vendor in vendors)


_OF_NVIDIA, _OF_AMD = "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"

_NO_DEVICE = ("-1", "NoDevFiles")

_COUNTS: Mapping[str, Callable[[Path], int]] = {
    _OF_NVIDIA: _count_nvidia,
    _OF_AMD: _count_amd,
    "ZE_AFFINITY_MASK": _count_intel,
}
"""How the accelerators are counted that a variable hides."""
