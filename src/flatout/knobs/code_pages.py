"""Put the machine code that the program runs on huge pages."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import mmap
import os
import platform
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "code_pages"

LEAST_OVERHEAD = 0.1
"""The knob is tried where Python and dispatch take at least this share of a step: large operators
run in loops, whose code is on a few pages."""

FEWEST_PRESENT = 32
"""A huge page is used where the process has mapped at least this many of its small pages so far.
Linux maps 16 at each fault (``fault_around_bytes``), whether or not the others are needed."""

_READ_EXECUTE = mmap.PROT_READ | mmap.PROT_EXEC
_MAYMOVE, _FIXED = 1, 2
"""Flags of ``mremap``, see <linux/mman.h>."""

_PRESENT = 1 << 63
"""The bit of an entry of /proc/self/pagemap that says that the page is mapped."""


def match(facts: Facts) -> Match:
    """Offer the setting where a step spends much of its time between operators."""
    if not _is_supported():
        return Match((), "it is for Linux on x86-64")
    if facts.huge_pages not in ("always", "madvise"):
        state = facts.huge_pages or "state unknown"
        return Match((), f"transparent huge pages are off on this machine ({state})")
    overhead = facts.overhead_share
    if overhead is not None and overhead < LEAST_OVERHEAD:
        return Match((), f"Python and dispatch take {overhead:.0%} of a step")
    return Match(("huge",), share=overhead)


def apply(host: Host, setting: str) -> Undo:
    """Move the code that has been used so far.

    Raises:
        RefusedError: the system does not allow it, or no library is large enough.
    """
    if not _is_supported():
        raise RefusedError("it is for Linux on x86-64")
    # Once it has been put back, it can no longer be seen what code was used.
    used: set[tuple[str, int]] = host.keep(NAME, "used", set)
    moved: list[_Code] = []
    with contextlib.ExitStack() as undo:
        undo.callback(_put_back_all, moved)
        try:
            huge = _huge_page_bytes()
            for code in _find_code(huge, used):
                _move(code, huge)
                moved.append(code)
        except OSError as error:
            raise RefusedError(f"the system does not allow it ({error.strerror})") from error
        if not moved:
            raise RefusedError("no library of the program has enough code in use")
        return undo.pop_all().close


@dataclasses.dataclass(frozen=True)
class _Code:
    """Part of the machine code of a library.

    Attributes:
        start: its first address, a multiple of the size of a huge page.
        size: in bytes, likewise.
        path: the file that it is mapped from.
        offset: of its first byte in this file.
    """

    start: int
    size: int
    path: str
    offset: int


def _is_supported() -> bool:
    return sys.platform == "linux" and platform.machine() == "x86_64"


def _huge_page_bytes() -> int:
    return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())


def _find_code(huge: int, used: set[tuple[str, int]]) -> list[_Code]:
    """Find the huge pages of libraries whose code has been used, those side by side as one.

    Args:
        huge: the size of a huge page, in bytes.
        used: the path and the address of those that were found before; gets the others.

    Raises:
        OSError: the system does not say what is mapped.
    """
    found: list[_Code] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_text().splitlines():
            for start, code in _split(line, huge):
                pagemap.seek(start // mmap.PAGESIZE * 8)
                entries = array("Q", pagemap.read(huge // mmap.PAGESIZE * 8))
                if sum(1 for entry in entries if entry & _PRESENT) >= FEWEST_PRESENT:
                    used.add((code.path, start))
                if (code.path, start) not in used:
                    continue
                last = found[-1] if found else None
                if last is not None and last.path == code.path and last.start + last.size == start:
                    found[-1] = dataclasses.replace(last, size=last.size + huge)
                else:
                    found.append(code)
    return found


def _split(line: str, huge: int) -> Iterator[tuple[int, _Code]]:
    """Yield the huge pages of a line of /proc/self/maps, if it is the code of a file."""
    words = line.split(None, 5)
    if len(words) < 6 or words[1] != "r-xp" or words[5].endswith("(deleted)"):
        return
    begin, end = (int(word, 16) for word in words[0].split("-"))
    for start in range(-(-begin // huge) * huge, end // huge * huge, huge):
        yield start, _Code(start, huge, words[5], int(words[2], 16) + start - begin)


def _move(code: _Code, huge: int) -> None:
    """Put a copy of some code, on huge pages, in its place.

    Linux changes the mapping while no thread can fault in it, and both hold the same bytes, so that
    other threads may run this very code meanwhile.

    Raises:
        OSError: the system does not allow it.
    """
    size = code.size + huge
    mapped = _mmap(size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    copy = -(-mapped // huge) * huge
    try:
        _check(_libc().madvise(copy, code.size, mmap.MADV_HUGEPAGE))
        ctypes.memmove(copy, code.start, code.size)
        _check(_libc().mprotect(copy, code.size, _READ_EXECUTE))
        _remap(copy, code.size, code.start)
    except OSError:
        _libc().munmap(mapped, size)
        raise
    if copy > mapped:
        _libc().munmap(mapped, copy - mapped)
    if mapped + size > copy + code.size:
        _libc().munmap(copy + code.size, mapped + size - copy - code.size)


def _put_back_all(moved: list[_Code]) -> None:
    for code in moved:
        # If the file is gone, the copy stays: it holds the same code.
        with contextlib.suppress(OSError):
            _put_back(code)


def _put_back(code: _Code) -> None:
    """Map the file again in the place of the copy, unless it is another file by now.

    Raises:
        OSError: it cannot be opened or mapped.
    """
    descriptor = os.open(code.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_POPULATE
        mapped = _mmap(code.size, _READ_EXECUTE, flags, descriptor, code.offset)
        if _libc().memcmp(mapped, code.start, code.size) == 0:
            _remap(mapped, code.size, code.start)
        else:
            _libc().munmap(mapped, code.size)
    finally:
        os.close(descriptor)


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    address, number = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = libc.mremap.restype = address
    libc.mmap.argtypes = [address, number, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mremap.argtypes = [address, number, number, ctypes.c_int, address]
    libc.madvise.argtypes = libc.mprotect.argtypes = [address, number, ctypes.c_int]
    libc.munmap.argtypes = [address, number]
    libc.memcmp.argtypes = [address, address, number]
    return libc


def _mmap(size: int, protection: int, flags: int, descriptor: int = -1, offset: int = 0) -> int:
    return _address(_libc().mmap(None, size, protection, flags, descriptor, offset))


def _remap(start: int, size: int, target: int) -> None:
    _address(_libc().mremap(start, size, size, _MAYMOVE | _FIXED, target))


def _address(result: int | None) -> int:
    if result is None or result == ctypes.c_void_p(-1).value:
        _check(-1)
    assert result is not None
    return result


def _check(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


KNOB = Knob(
    name=NAME,
    summary="put the machine code that the program runs on huge pages",
    settings=("huge",),
    exactness={"huge": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu"),
    card=Card(
        what="Torch's libraries hold hundreds of megabytes of machine code, mapped in pages of "
        "4 KiB. A step of small operators runs a little of it everywhere, so the processor keeps "
        "looking up where these pages are (misses of its instruction TLB), above all in a virtual "
        "machine. The knob copies the code that has been used so far to transparent huge pages, "
        "and maps the copy in the place of the file. The code stays the same, and so does all that "
        "it computes.",
        helps="The knob helps programs with short steps and many small operators, also those that "
        "keep a GPU waiting.",
        hurts="A process needs 20 to 100 MiB more memory, and the copying takes up to a second. "
        "Profilers such as `perf` do not find the names of functions in code that has moved. The "
        "knob needs Linux on x86-64 with transparent huge pages "
        "(`/sys/kernel/mm/transparent_hugepage/enabled`).",
        by_hand="Start the program with a library that does the same for large executables, such "
        "as Intel's `iodlr`, adapted to shared libraries.",
        sources=(
            "https://docs.kernel.org/admin-guide/mm/transhuge.html",
            "https://github.com/intel/iodlr",
            "https://man7.org/linux/man-pages/man2/mremap.2.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the pages of machine code",),
    memory_settings=("huge",),
    slow_switch=True,
)
