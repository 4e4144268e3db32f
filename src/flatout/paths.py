"""Where flatout keeps its own files: records (state) and what can be made again (cache).

``FLATOUT_HOME`` holds both when it is set; otherwise the XDG base directories
(https://specifications.freedesktop.org/basedir-spec/latest/).
"""

from __future__ import annotations

import os
from pathlib import Path


def runs_directory() -> Path:
    """Where the run directories are."""
    return _base("XDG_STATE_HOME", ".local/state") / "runs"


def cache_directory() -> Path:
    """Where measured ceilings and the scratch of isolated runs are."""
    home = os.environ.get("FLATOUT_HOME")
    return Path(home) / "cache" if home else _base("XDG_CACHE_HOME", ".cache")


def shown(path: Path) -> str:
    """A path as a user would write it, with ``~`` for the home directory."""
    try:
        return f"~/{path.relative_to(Path.home())}"
    except (ValueError, RuntimeError):
        return str(path)


def _base(variable: str, default: str) -> Path:
    home = os.environ.get("FLATOUT_HOME")
    if home:
        return Path(home).absolute()
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / default) / "flatout"
