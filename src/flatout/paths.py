"""Where flatout keeps its own files: records and tunes (state) and what can be made again (cache).

``FLATOUT_HOME`` holds both when it is set, and ``FLATOUT_CACHE`` the cache; otherwise the XDG base
directories (https://specifications.freedesktop.org/basedir-spec/latest/).
"""

from __future__ import annotations

import os
from pathlib import Path

from flatout.errors import UserError


def runs_directory() -> Path:
    """Where the run directories are."""
    return _base("XDG_STATE_HOME", ".local/state") / "runs"


def tunes_directory() -> Path:
    """Where the folders of tunes are."""
    return _base("XDG_STATE_HOME", ".local/state") / "tunes"


def cache_directory() -> Path:
    """Where measured ceilings, compiled kernels and the scratch of isolated runs are."""
    cache = os.environ.get("FLATOUT_CACHE")
    if cache:
        return Path(cache).absolute()
    home = os.environ.get("FLATOUT_HOME")
    return Path(home) / "cache" if home else _base("XDG_CACHE_HOME", ".cache")


def shown(path: Path) -> str:
    """A path as a user would write it, with ``~`` for the home directory."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)


def check_writable(file: Path) -> None:
    """Check that a file can be written, before work that would be lost otherwise.

    Raises:
        UserError: its folder does not exist, or the file or folder is read-only.
    """
    folder = file.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{file} cannot be written: there is no folder {file.parent}")
    if file.is_dir():
        raise UserError(f"{file} cannot be written: it is a folder")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"{file} cannot be written: it is read-only here")


def _base(variable: str, default: str) -> Path:
    home = os.environ.get("FLATOUT_HOME")
    if home:
        return Path(home).absolute()
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "flatout"
