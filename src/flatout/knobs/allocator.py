"""Make the job's C allocator use huge pages and keep freed memory, or preload another allocator."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "allocator"

TUNABLES = {
    "hugepages": "glibc.malloc.hugetlb=1",
    "keep": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=4294967296",
}
"""glibc's tunables for each setting. ``hugepages`` backs the heap with transparent huge pages;
``keep`` also takes large blocks from the heap, and returns memory to the system only when more than
4 GiB are free at the end of the heap.
https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html"""

PRELOADED = {"tcmalloc": ("tcmalloc_minimal", "tcmalloc"), "jemalloc": ("jemalloc",)}
"""For each setting that preloads an allocator, the names of its library, in order of preference."""

JEMALLOC_CONF = "oversize_threshold:1,background_thread:true,metadata_thp:auto"
"""The value that ``torch.backends.xeon.run_cpu`` sets."""

CONFIGURING = {
    "GLIBC_TUNABLES": ("glibc.malloc",),
    "LD_PRELOAD": ("tcmalloc", "jemalloc", "mimalloc"),
}
"""Variables that configure the allocator if their value contains one of these words."""

OLDEST_GLIBC = (2, 35)
"""The first version with ``glibc.malloc.hugetlb``."""

CHANCE = 0.05
"""Below this share of a step's time, the page faults of one process do not predict those of the
next: glibc returns memory at each step or never, depending on what lies at the end of its heap."""


def match(facts: Facts) -> Match:
    """Offer glibc's settings where it supports them, and the allocators that are installed."""
    configured_by = _variable_in_use(os.environ)
    if configured_by is not None:
        return Match((), f"{configured_by} is set already")
    settings = []
    glibc = _glibc()
    if glibc is None or glibc < OLDEST_GLIBC:
        why = "glibc 2.35 or later is needed"
    elif facts.huge_pages not in ("always", "madvise"):
        state = facts.huge_pages or "state unknown"
        why = f"transparent huge pages are off on this machine ({state})"
    else:
        why = None
        settings += ["keep", "hugepages"]
    settings += [name for name in PRELOADED if library(name) is not None]
    share = facts.page_fault_share
    if share is not None and share < CHANCE:
        share = None
    return Match(tuple(settings), None if settings else why, share)


def variables(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a setting; none where the user has configured the allocator already."""
    if _variable_in_use(environment) is not None:
        return {}
    if setting in TUNABLES:
        return {"GLIBC_TUNABLES": _append(environment.get("GLIBC_TUNABLES"), TUNABLES[setting])}
    path = library(setting)
    if path is None:
        return {}
    extra = {"MALLOC_CONF": JEMALLOC_CONF} if setting == "jemalloc" else {}
    return {"LD_PRELOAD": _append(environment.get("LD_PRELOAD"), path), **extra}


def apply(host: Host, setting: str) -> Undo:
    """Check that this process was started with the variables; they are read only at the start.

    Raises:
        RefusedError: it was not.
    """
    variable = "GLIBC_TUNABLES" if setting in TUNABLES else "LD_PRELOAD"
    value = TUNABLES.get(setting, setting)
    if value not in os.environ.get(variable, ""):
        configured_by = _variable_in_use(os.environ)
        why = f"{configured_by} was set already" if configured_by else f"{setting} is not available"
        raise RefusedError(f"the program was not started with {value}: {why}")
    return lambda: None


def library(name: str) -> str | None:
    """The path of an allocator's library, ``None`` if the dynamic loader does not find it."""
    installed = _installed_libraries()
    return next((installed[file] for file in PRELOADED[name] if file in installed), None)


@functools.cache
def _installed_libraries() -> dict[str, str]:
    """The path of each library in the dynamic loader's cache, by its name without ``lib`` and
    ``.so``.

    ``ctypes.util.find_library`` would start a compiler, which writes into the temporary folder.
    """
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if ldconfig is None:
        return {}
    listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    paths: dict[str, str] = {}
    for name, path in re.findall(r"^\s*lib(\S+?)\.so\S* .*=> (\S+)$", listed, re.MULTILINE):
        paths.setdefault(name, path)
    return paths


def _variable_in_use(environment: Mapping[str, str]) -> str | None:
    """The variable by which the user has configured the allocator, if any."""
    for variable, value in sorted(environment.items()):
        words = CONFIGURING.get(variable, ("",) if variable.startswith("MALLOC_") else ())
        if any(word in value for word in words):
            return variable
    return None


def _append(present: str | None, added: str) -> str:
    return f"{present}:{added}" if present else added


def _glibc() -> tuple[int, ...] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else None
    except (AttributeError, ValueError, OSError):
        return None


KNOB = Knob(
    name=NAME,
    summary="make the C allocator use huge pages and keep freed memory, or replace the allocator",
    settings=("hugepages", "keep", "tcmalloc", "jemalloc"),
    exactness=dict.fromkeys(("hugepages", "keep", "tcmalloc", "jemalloc"), "bitwise"),
    hot=False,
    platforms=("cpu",),
    card=Card(
        what="The knob sets environment variables of the C allocator before the program starts.\n\n"
        "- `hugepages`: glibc uses transparent huge pages (`glibc.malloc.hugetlb=1`), so "
        "2 MiB of a large tensor cause one page fault, not 512 (one for each page of "
        "4 KiB).\n"
        "- `keep`: in addition, glibc takes large blocks from the heap, and returns "
        "memory to the system only when more than 4 GiB are free at the end of the heap. "
        "So each step reuses the memory of the previous step.\n"
        "- `tcmalloc`, `jemalloc`: the allocator of that name is preloaded, if it is "
        "installed.\n\n"
        "The knob does nothing if the environment already configures the allocator.",
        helps="The knob helps programs in which page faults take a large part of the step "
        "(`flatout doctor` counts them). These have large activations on the CPU, often "
        "in convolutions.",
        hurts="The program needs more memory. `hugepages` and `keep` require that huge pages "
        "are enabled (`/sys/kernel/mm/transparent_hugepage/enabled`).",
        by_hand="Start the program with "
        "`GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
        "glibc.malloc.trim_threshold=4294967296 python train.py`.",
        sources=(
            "https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the C allocator",),
    variables=variables,
    memory_settings=("hugepages", "keep", "tcmalloc", "jemalloc"),
)
