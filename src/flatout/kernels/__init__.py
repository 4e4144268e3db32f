"""Build and load C kernels; they are compiled for this processor at their first use and cached.

A kernel is a file ``NAME.c`` in this folder with a plain C interface that needs none of torch's
headers. The name of its shared library in the cache contains a hash of everything that it depends
on: sources, compiler, flags and processor. Where several processes need the same kernel at once,
such as ranks, one builds it and the others wait (``built_by_one``).

The kernels use OpenMP, but are not linked to it. The symbols come from the OpenMP runtime that
torch has loaded into the global scope, so the process has only one thread pool.

This module uses only the standard library.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flatout import paths
from flatout.machine import system

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wall")
FLAGS_OF = {"optimizers": ("-ffp-contract=off",)}
"""Further flags of single kernels. An optimizer's step must round each operation where torch does,
so multiplications and additions must not be contracted."""

OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()
COMPILE_SECONDS = 120


class KernelError(RuntimeError):
    """A kernel is not available: there is no compiler, or it cannot be built, loaded or used."""


class Library(ctypes.CDLL):
    """A loaded kernel with its functions as attributes.

    Raises:
        KernelError: an attribute is looked up that is no function of the kernel.
    """

    def __getattr__(self, name: str) -> ctypes._NamedFuncPointer:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("__"):
                raise
            raise KernelError(f"{self._name} has no function {name}") from error


@functools.cache
def load(name: str) -> Library:
    """Load a kernel; it is built first if it is not in the cache.

    Its functions release the global interpreter lock while they run.

    Args:
        name: the name of the source file, without ``.c``.

    Raises:
        KernelError: it cannot be built or loaded; the message is one sentence.
    """
    try:
        return Library(str(build(name)))
    except OSError as error:
        raise KernelError(f"the kernel {name} cannot be loaded: {error}") from error


def build(name: str) -> Path:
    """Build a kernel if it is not in the cache; returns the path of its shared library.

    Args:
        name: the name of the source file, without ``.c``.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    source = Path(__file__).with_name(f"{name}.c")
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("there is no C compiler (CC, cc, gcc or clang)")
    command = [*compiler, *FLAGS, *FLAGS_OF.get(name, ()), *OPENMP]
    digest = hashlib.sha256()
    sources = [source, *sorted(source.parent.glob("*.h"))]
    parts = [file.read_bytes() for file in sources]
    for part in (*parts, "\0".join(command).encode(), _processor().encode()):
        digest.update(hashlib.sha256(part).digest())
    folder = paths.cache_directory() / "kernels"
    library = folder / f"{name}-{digest.hexdigest()[:24]}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with built_by_one(library, COMPILE_SECONDS):
                if not library.exists():
                    _compile(command, source, library)
        except OSError as error:
            raise KernelError(f"the kernel {name} cannot be built: {error}") from error
    return library


@contextlib.contextmanager
def built_by_one(library: Path, most_seconds: float) -> Iterator[None]:
    """A context for building a library, which one process at a time enters.

    Processes that wait for longer than ``most_seconds``, or whose file system has no locks, enter
    as well: each builds a file of its own, and the last one that renames it wins, with the same
    content.

    Args:
        library: the path of the library, in a folder that exists.
        most_seconds: how long building it takes at most.

    Raises:
        OSError: the folder cannot be written.
    """
    if fcntl is None:
        yield
        return
    lock_file = library.with_suffix(".lock")
    with open(lock_file, "w") as lock:
        deadline_s = time.monotonic() + most_seconds
        while time.monotonic() < deadline_s:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        try:
            yield
        finally:
            # A child that was forked meanwhile holds the same lock, so closing the file is no end.
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_UN)
            lock_file.unlink(missing_ok=True)


def find_compiler(
    variable: str = "CC", names: tuple[str, ...] = ("cc", "gcc", "clang")
) -> list[str] | None:
    """The command of a compiler: the one that an environment variable names, else the first one
    that is available."""
    users_choice = shlex.split(os.environ.get(variable, ""))
    for words in (users_choice, *([name] for name in names)):
        program = shutil.which(words[0]) if words else None
        if program is not None:
            return [program, *words[1:]]
    return None


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Compile with OpenMP and link without it; see the module's docstring."""
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        object_file, partial = folder / "kernel.o", folder / "kernel.so"
        compile_command = [*command, "-c", str(source), "-o", str(object_file)]
        link_command = [command[0], "-shared", str(object_file), "-o", str(partial), "-lm"]
        if sys.platform == "darwin":
            link_command += ["-undefined", "dynamic_lookup"]
        for step in (compile_command, link_command):
            run_compiler(step, source.name, name, COMPILE_SECONDS)
        partial.replace(library)


def run_compiler(command: list[str], source: str, folder: str, seconds: float) -> None:
    """Run a compiler.

    Args:
        command: the command line.
        source: the name of what it compiles, for the message.
        folder: the folder for its temporary files.
        seconds: how long it may take.

    Raises:
        KernelError: it fails, or takes too long.
    """
    try:
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": folder},
        )
    except subprocess.TimeoutExpired:
        raise KernelError(f"{command[0]} took over {seconds:.0f} s") from None
    if completed.returncode != 0:
        errors = completed.stderr.strip().splitlines()
        first = next((line for line in errors if "error" in line), errors[0] if errors else "")
        why = first or f"exit status {completed.returncode}"
        raise KernelError(f"{command[0]} cannot build {source}: {why}")


@functools.cache
def _processor() -> str:
    """A description of the processor that determines the meaning of ``-march=native``."""
    fields = system.cpu_fields()
    names = ("model name", "flags", "Features", "CPU part", "vendor_id", "cpu family", "model")
    lines = [f"{name}: {fields[name]}" for name in names if name in fields]
    return "\n".join(lines) or f"{platform.machine()} {platform.processor()}"
