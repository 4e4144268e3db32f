"""The files that the program has been imported from: those that are its own."""

from __future__ import annotations

import os
import sys
import sysconfig
from types import ModuleType

from flatout.wire.lines import Modules
from flatout.wire.writer import RecordWriter

_PACKAGES = frozenset(("site-packages", "dist-packages"))
_GENERATED = "torchinductor_"
"""Begins the name of the folder of what ``torch.compile`` has written."""


def imported_files() -> list[str]:
    """Files of modules outside of the standard library, installed packages, torch and flatout."""
    installed = sysconfig.get_paths()
    folders = {installed["stdlib"], installed["platstdlib"], _folder_of("torch")}
    folders |= {_folder_of("flatout")}
    folders |= {os.path.realpath(folder) for folder in folders}
    elsewhere = tuple(f"{folder}{os.sep}" for folder in folders)
    found = set()
    for module in list(sys.modules.values()):
        path = _file_of(module)
        if path is None or path.startswith(elsewhere) or _PACKAGES.intersection(path.split(os.sep)):
            continue
        real = os.path.realpath(path)
        parts = real.split(os.sep)
        is_generated = any(part.startswith(_GENERATED) for part in parts)
        if not (real.startswith(elsewhere) or _PACKAGES.intersection(parts) or is_generated):
            found.add(real)
    return sorted(found)


def write_modules(record: RecordWriter) -> None:
    """Write down what the program has imported of its own by now."""
    record.write(Modules(tuple(imported_files())))


def _file_of(module: object) -> str | None:
    """Where a module is from, without asking the module itself: it may import more when asked."""
    if not issubclass(type(module), ModuleType):
        return None
    path = object.__getattribute__(module, "__dict__").get("__file__")
    return path if type(path) is str and os.path.isabs(path) else None


def _folder_of(package: str) -> str:
    """Where a package that has been imported lies."""
    path = _file_of(sys.modules[package])
    assert path is not None
    return os.path.dirname(path)
