"""The C allocator of the job: huge pages, memory that is kept, another allocator."""

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
"""https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html: back the
heap with transparent huge pages; take large blocks from the heap as well, and give nothing back
below 4 GiB."""

PRELOADED = {"tcmalloc": ("tcmalloc_minimal", "tcmalloc"), "jemalloc": ("jemalloc",)}

JEMALLOC_CONF = "oversize_threshold:1,background_thread:true,metadata_thp:auto"
"""What ``torch.backends.xeon.run_cpu`` sets."""

STEERING = {
    "GLIBC_TUNABLES": ("glibc.malloc",),
    "LD_PRELOAD": ("tcmalloc", "jemalloc", "mimalloc"),
}
"""Variables that steer the allocator if one of these words is in them."""

OLDEST_GLIBC = (2, 35)
"""The first with ``glibc.malloc.hugetlb``."""


CHANCE = 0.05
"""Share of the step's time in page faults below which one process says little of the next: glibc
gives memory back at each step or never, depending on what happens to lie at the end of its heap."""


def match(facts: Facts) -> Match:
    """Needs glibc 2.35 or later and huge pages for the one, the library for the other."""
    chosen = _chosen(os.environ)
    if chosen is not None:
        return Match((), f"{chosen} is set already")
    settings = []
    glibc = _glibc()
    if glibc is None or glibc < OLDEST_GLIBC:
        why = "there is no glibc of 2.35 or later here"
    elif facts.huge_pages not in ("always", "madvise"):
        why = f"huge pages are switched off here ({facts.huge_pages or 'not known'})"
    else:
        why = None
        settings += ["keep", "hugepages"]
    settings += [name for name in PRELOADED if library(name) is not None]
    share = facts.page_fault_share
    known = None if share is None or share < CHANCE else share
    return Match(tuple(settings), None if settings else why, known)


def variables(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a setting; none where the user steers the allocator already."""
    if _chosen(environment) is not None:
        return {}
    if setting in TUNABLES:
        return {"GLIBC_TUNABLES": _joined(environment.get("GLIBC_TUNABLES"), TUNABLES[setting])}
    found = library(setting)
    if found is None:
        return {}
    extra = {"MALLOC_CONF": JEMALLOC_CONF} if setting == "jemalloc" else {}
    return {"LD_PRELOAD": _joined(environment.get("LD_PRELOAD"), found), **extra}


def apply(host: Host, setting: str) -> Undo:
    """See whether this process was started as asked; nothing can be done about it now."""
    variable = "GLIBC_TUNABLES" if setting in TUNABLES else "LD_PRELOAD"
    asked = TUNABLES.get(setting, setting)
    if asked not in os.environ.get(variable, ""):
        steered = _chosen(os.environ)
        why = f"{steered} was set already" if steered else f"{setting} is not to be had"
        raise RefusedError(f"the program was not started with {asked}: {why}")
    return lambda: None


def library(name: str) -> str | None:
    """The path of an allocator's library, ``None`` if the loader does not know it."""
    installed = _installed_libraries()
    return next((installed[file] for file in PRELOADED[name] if file in installed), None)


@functools.cache
def _installed_libraries() -> dict[str, str]:
    """Path of each library in the cache of the dynamic loader, by name without ``lib`` and ``.so``.

    ``ctypes.util.find_library`` would start a compiler, which writes into the temporary folder.
    """
    ldconfig = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if ldconfig is None:
        return {}
    listed = subprocess.run([ldconfig, "-p"], capture_output=True, text=True, check=False).stdout
    found: dict[str, str] = {}
    for name, path in re.findall(r"^\s*lib(\S+?)\.so\S* .*=> (\S+)$", listed, re.MULTILINE):
        found.setdefault(name, path)
    return found


def _chosen(environment: Mapping[str, str]) -> str | None:
    """The variable by which the user steers the allocator, if any."""
    for variable, value in sorted(environment.items()):
        words = STEERING.get(variable, ("",) if variable.startswith("MALLOC_") else ())
        if any(word in value for word in words):
            return variable
    return None


def _joined(present: str | None, added: str) -> str:
    return f"{present}:{added}" if present else added


def _glibc() -> tuple[int, ...] | None:
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(map(int, version.split("."))) if name == "glibc" else None
    except (AttributeError, ValueError, OSError):
        return None


KNOB = Knob(
    name=NAME,
    summary="huge pages and kept memory for the C allocator, or another allocator",
    settings=("hugepages", "keep", "tcmalloc", "jemalloc"),
    exactness=dict.fromkeys(("hugepages", "keep", "tcmalloc", "jemalloc"), "bitwise"),
    hot=False,
    platforms=("cpu",),
    card=Card(
        what="Sets the environment in which the program starts. `hugepages`: glibc asks for "
        "transparent huge pages (`glibc.malloc.hugetlb=1`), so that a large tensor costs one page "
        "fault for each 2 MiB instead of 512. `keep`: besides, large blocks come from the heap, "
        "which is not given back below 4 GiB, so that the next step finds its memory where the "
        "last one left it. `tcmalloc`, `jemalloc`: that allocator is preloaded, if it is "
        "installed. A program whose environment steers the allocator already is left alone.",
        helps="Page faults take a good part of the step (`flatout doctor` counts them): large "
        "activations on the CPU, convolutions above all.",
        hurts="The program needs more memory. Huge pages must not be switched off "
        "(`/sys/kernel/mm/transparent_hugepage/enabled`).",
        by_hand="`GLIBC_TUNABLES=" + TUNABLES["keep"] + " python train.py`",
        sources=(
            "https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the C allocator",),
    variables=variables,
)
