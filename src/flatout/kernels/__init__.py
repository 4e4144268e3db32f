"""C kernels behind hot operators: compiled on first use for this processor, then cached.

A kernel is one ``NAME.c`` in this folder with a plain C interface; no header of torch is needed.
The shared library lies in the cache under a name made of everything that it depends on: source,
compiler, flags and processor. Several processes may build the same one at once: each builds its
own file, and the last rename wins, with the same content.

The kernels use OpenMP, but are not linked to it: its symbols come from the runtime that torch has
loaded into the global scope, so that there is one pool of threads in the process. Standard library
only.
"""

from __future__ import annotations

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
from pathlib import Path

from flatout import paths
from flatout.machine import system

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-Wall")
FLAGS_OF = {"optimizers": ("-ffp-contract=off",)}
"""Besides, of a kernel: an optimizer's step rounds each operation where torch does."""

OPENMP = ("-fopenmp",) if sys.platform == "linux" else ()
COMPILE_SECONDS = 120


class KernelError(RuntimeError):
    """A kernel that cannot be had here: no compiler, or what it made cannot be loaded or used."""


class Library(ctypes.CDLL):
    """A kernel's functions, as attributes.

    Raises:
        KernelError: there is none of this name.
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
    """The library of a kernel, built if it is not in the cache.

    Its functions release the global interpreter lock while they run.

    Args:
        name: of the source file, without ``.c``.

    Raises:
        KernelError: it cannot be built or loaded; the message is one sentence.
    """
    try:
        return Library(str(build(name)))
    except OSError as error:
        raise KernelError(f"the kernel {name} cannot be loaded: {error}") from error


def build(name: str) -> Path:
    """The path of a kernel's shared library, built if it is not in the cache.

    Raises:
        KernelError: there is no compiler, or it fails.
    """
    source = Path(__file__).with_name(f"{name}.c")
    compiler = find_compiler()
    if compiler is None:
        raise KernelError("there is no C compiler (CC, cc, gcc or clang)")
    command = [*compiler, *FLAGS, *FLAGS_OF.get(name, ()), *OPENMP]
    key = hashlib.sha256()
    sources = [source, *sorted(source.parent.glob("*.h"))]
    parts = [file.read_bytes() for file in sources]
    for part in (*parts, "\0".join(command).encode(), _processor().encode()):
        key.update(hashlib.sha256(part).digest())
    folder = paths.cache_directory() / "kernels"
    library = folder / f"{name}-{key.hexdigest()[:24]}.so"
    if not library.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _compile(command, source, library)
        except OSError as error:
            raise KernelError(f"the kernel {name} cannot be built: {error}") from error
    return library


def find_compiler() -> list[str] | None:
    """The command of the C compiler: ``CC`` if it is set, else the first of cc, gcc and clang."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for words in (chosen, ["cc"], ["gcc"], ["clang"]):
        program = shutil.which(words[0]) if words else None
        if program is not None:
            return [program, *words[1:]]
    return None


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Compile with OpenMP, link without: see the top of this file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        made = Path(name)
        object_file, partial = made / "kernel.o", made / "kernel.so"
        compiling = [*command, "-c", str(source), "-o", str(object_file)]
        linking = [command[0], "-shared", str(object_file), "-o", str(partial), "-lm"]
        if sys.platform == "darwin":
            linking += ["-undefined", "dynamic_lookup"]
        for step in (compiling, linking):
            try:
                done = subprocess.run(
                    step,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=COMPILE_SECONDS,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "TMPDIR": name},
                )
            except subprocess.TimeoutExpired:
                raise KernelError(f"{command[0]} took over {COMPILE_SECONDS} s") from None
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
                raise KernelError(f"{command[0]} cannot build {source.name}: {said[0]}")
        partial.replace(library)


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on."""
    fields = system.cpu_fields()
    kept = ("model name", "flags", "Features", "CPU part", "vendor_id", "cpu family", "model")
    said = [f"{name}: {fields[name]}" for name in kept if name in fields]
    return "\n".join(said) or f"{platform.machine()} {platform.processor()}"
