"""Build and load extensions of Python in C++ that are compiled against torch's headers.

An extension is a file ``NAME.cpp`` in this folder. Unlike a kernel, it depends on the torch and the
Python that will load it, so only the agent can build it: it takes about half a minute, once for
each version of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

from flatout import paths
from flatout.kernels import KernelError, built_by_one, find_compiler, run_compiler

FLAGS = ("-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-w")
LIBRARIES = ("torch", "torch_cpu", "torch_python", "c10")
COMPILERS = ("CXX", ("c++", "g++", "clang++"))
COMPILE_SECONDS = 300

_may_build: ContextVar[bool] = ContextVar("may_build", default=True)


def missing() -> str | None:
    """What is needed to build an extension and this machine lacks, as a clause; ``None`` if
    nothing."""
    if find_compiler(*COMPILERS) is None:
        return "there is no C++ compiler (CXX, c++, g++ or clang++)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"Python's headers are not installed ({header})"
    return None


@functools.cache
def load(name: str) -> ModuleType:
    """Load an extension; it is built first if it is not in the cache.

    Args:
        name: the name of the source file, without ``.cpp``.

    Raises:
        KernelError: it cannot be built or loaded; the message is one sentence.
    """
    path = build(name)
    module_name = f"flatout_{name}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise KernelError(f"the extension {name} cannot be loaded: {error}") from error
    return module


@contextlib.contextmanager
def built_only() -> Iterator[None]:
    """A context in which no extension is built: one that is not in the cache cannot be loaded."""
    token = _may_build.set(False)
    try:
        yield
    finally:
        _may_build.reset(token)


def build_with(
    python: str, torch_version: str, names: Collection[str], on_begin: Callable[[], None]
) -> None:
    """Build extensions with the interpreter of a job, unless that was done before.

    One that cannot be built is no error here: the agent meets the same error and records it.

    Args:
        python: the path of the interpreter.
        torch_version: of its torch.
        names: of the extensions.
        on_begin: called if something has to be built.
    """
    digest = hashlib.sha256("\0".join((python, torch_version, *sorted(names))).encode())
    for name in sorted(names):
        digest.update(_source(name).read_bytes())
    mark = _folder() / f"built-{digest.hexdigest()[:24]}"
    if not names or missing() is not None or mark.exists():
        return
    on_begin()
    script = Path(__file__).with_name("builder.py")
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "FLATOUT_DISABLE": "1"}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        subprocess.run(
            [python, str(script), *sorted(names)],
            capture_output=True,
            timeout=COMPILE_SECONDS,
            check=True,
            env=environment,
        )
        mark.touch()


def _source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.cpp")


def _folder() -> Path:
    return paths.cache_directory() / "kernels"


def build(name: str) -> Path:
    """Build an extension if it is not in the cache, and return its path.

    Args:
        name: the name of the source file, without ``.cpp``.

    Raises:
        KernelError: it cannot be built; the message is one sentence.
    """
    import torch

    module_name = f"flatout_{name}"
    why = missing()
    if why is not None:
        raise KernelError(why)
    compiler = find_compiler(*COMPILERS)
    assert compiler is not None
    root = Path(torch.__file__).parent
    include = [root / "include", root / "include/torch/csrc/api/include"]
    command = [
        *compiler,
        *FLAGS,
        f"-DTORCH_EXTENSION_NAME={module_name}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(word for folder in include for word in ("-isystem", str(folder))),
        f"-I{sysconfig.get_path('include')}",
    ]
    link = [f"-L{root / 'lib'}", *(f"-l{library}" for library in LIBRARIES)]
    source = _source(name)
    version = f"{torch.__version__} {torch.version.git_version} {sys.version}"
    digest = hashlib.sha256()
    for part in (source.read_bytes(), "\0".join((*command, *link)).encode(), version.encode()):
        digest.update(hashlib.sha256(part).digest())
    folder = _folder()
    library = folder / f"{name}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    if not _may_build.get():
        raise KernelError(f"the extension {name} has not been built yet")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with built_by_one(library, COMPILE_SECONDS):
            if not library.exists():
                _compile([*command, "-shared", str(source)], link, library)
    except OSError as error:
        raise KernelError(f"the extension {name} cannot be built: {error}") from error
    return library


def _compile(command: list[str], link: list[str], library: Path) -> None:
    """Compile and link; the last word of the command is the path of the source file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        partial = Path(scratch, "extension.so")
        whole = [*command, "-o", str(partial), *link]
        run_compiler(whole, Path(command[-1]).name, scratch, COMPILE_SECONDS)
        partial.replace(library)
