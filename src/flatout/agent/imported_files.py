"""Finding the source files that the program has imported, except installed packages."""

from __future__ import annotations

import os
import sys
import sysconfig
from types import ModuleType

from flatout.wire.lines import ImportedFiles
from flatout.wire.writer import RecordWriter

_PACKAGES = frozenset(("site-packages", "dist-packages"))
_GENERATED = "torchinductor_"
"""The prefix of the folder to which ``torch.compile`` writes generated code."""

_REMOTE_MODULE = "_remote_module_"
"""The prefix of the modules that torch 2.9 generates into a temporary folder when it is imported
(``torch.distributed.nn.jit.instantiator``)."""


def imported_files() -> list[str]:
    """Return the sorted paths of the files of imported modules, except those of the standard
    library, installed packages, torch and flatout."""
    installed = sysconfig.get_paths()
    folders = {installed["stdlib"], installed["platstdlib"], _folder_of("torch")}
    folders |= {_folder_of("flatout")}
    folders |= {os.path.realpath(folder) for folder in folders}
    excluded = tuple(f"{folder}{os.sep}" for folder in folders)
    found = set()
    for module in list(sys.modules.values()):
        path = _file_of(module)
        if path is None or path.startswith(excluded) or _PACKAGES.intersection(path.split(os.sep)):
            continue
        real = os.path.realpath(path)
        parts = real.split(os.sep)
        is_generated = any(part.startswith(_GENERATED) for part in parts)
        is_generated |= parts[-1].startswith(_REMOTE_MODULE)
        if not (real.startswith(excluded) or _PACKAGES.intersection(parts) or is_generated):
            found.add(real)
    return sorted(found)


def write_imported_files(record: RecordWriter) -> None:
    """Record the source files that have been imported so far."""
    record.write(ImportedFiles(tuple(imported_files())))


def _file_of(module: object) -> str | None:
    """Return the file of a module. The module's ``__getattr__``, which may import more, is not
    called."""
    if not issubclass(type(module), ModuleType):
        return None
    path = object.__getattribute__(module, "__dict__").get("__file__")
    return path if type(path) is str and os.path.isabs(path) else None


def _folder_of(package: str) -> str:
    """Return the folder of an imported package."""
    path = _file_of(sys.modules[package])
    assert path is not None
    return os.path.dirname(path)
