"""Makes a directory for each run, and removes the oldest when they are too many."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from flatout import paths

KEPT_RUNS = 50
KEPT_BYTES = 256 * 2**20
"""The number and the size of the runs that are kept; the oldest are removed first."""


def new_run_directory() -> Path:
    """Make a directory for a run, and remove old ones.

    Raises:
        OSError: the directory cannot be made (read-only folder, full disk).
    """
    runs = paths.runs_directory()
    runs.mkdir(parents=True, exist_ok=True)
    clear_old(runs, KEPT_RUNS, KEPT_BYTES)
    return new_directory(runs)


def new_directory(parent: Path) -> Path:
    """Make a directory whose name has the time and the id of this process.

    Raises:
        OSError: the directory cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory = parent / f"{stamp}-{os.getpid()}-{secrets.token_hex(2)}"
    directory.mkdir()
    return directory


def clear_old(
    parent: Path,
    kept: int,
    kept_bytes: int,
    is_in_use: Callable[[Path], bool] | None = None,
) -> None:
    """Remove the oldest directories beyond a number and a size, but none that is in use.

    Args:
        parent: the folder that they are in.
        kept, kept_bytes: the number and the size of those that stay.
        is_in_use: whether a directory is in use; by default, whether its maker is alive.
    """
    is_in_use = is_in_use or _is_makers
    directories = sorted(
        (entry for entry in parent.iterdir() if entry.is_dir()), key=lambda d: d.name, reverse=True
    )
    total_bytes = 0
    for number, directory in enumerate(directories, 1):
        total_bytes += _size(directory)
        if (number > kept or total_bytes > kept_bytes) and not is_in_use(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _size(directory: Path) -> int:
    total_bytes = 0
    for entry in directory.rglob("*"):
        try:
            total_bytes += entry.stat().st_size
        except OSError:
            continue  # another flatout has removed it meanwhile
    return total_bytes


def _is_makers(directory: Path) -> bool:
    """Whether the flatout that made a directory still runs; the name has its process id."""
    parts = directory.name.split("-")
    if len(parts) != 4 or not parts[2].isdigit():
        return False
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
