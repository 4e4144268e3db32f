"""Run directories: made one for each run, cleared when they grow too many; tunes' folders too."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from pathlib import Path

from flatout import paths

KEPT_RUNS = 50
KEPT_BYTES = 256 * 2**20
"""What is kept of old runs; the oldest go first."""


def new_run_directory() -> Path:
    """Make a directory for a run, and clear old ones.

    Raises:
        OSError: it cannot be made (read-only folder, full disk).
    """
    runs = paths.runs_directory()
    runs.mkdir(parents=True, exist_ok=True)
    clear_old(runs, KEPT_RUNS, KEPT_BYTES)
    return new_directory(runs)


def new_directory(parent: Path) -> Path:
    """Make a directory whose name tells when and by which process it was made.

    Raises:
        OSError: it cannot be made.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory = parent / f"{stamp}-{os.getpid()}-{secrets.token_hex(2)}"
    directory.mkdir()
    return directory


def clear_old(parent: Path, kept: int, kept_bytes: int) -> None:
    """Remove the oldest directories beyond a number and a size, but none in use."""
    directories = sorted(
        (entry for entry in parent.iterdir() if entry.is_dir()), key=lambda d: d.name, reverse=True
    )
    total_bytes = 0
    for number, directory in enumerate(directories, 1):
        total_bytes += _size(directory)
        if (number > kept or total_bytes > kept_bytes) and not _in_use(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _size(directory: Path) -> int:
    total_bytes = 0
    for entry in directory.rglob("*"):
        try:
            total_bytes += entry.stat().st_size
        except OSError:
            continue  # another flatout has cleared it meanwhile
    return total_bytes


def _in_use(directory: Path) -> bool:
    """Whether the flatout that made it still runs; its process id is part of the name."""
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
