"""Run directories: made one for each run, cleared when they grow too many."""

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
    """Make a run directory, and clear old ones.

    Raises:
        OSError: it cannot be made (read-only folder, full disk).
    """
    runs = paths.runs_directory()
    runs.mkdir(parents=True, exist_ok=True)
    clear_old_runs(runs)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    directory = runs / f"{stamp}-{os.getpid()}-{secrets.token_hex(2)}"
    directory.mkdir()
    return directory


def clear_old_runs(runs: Path) -> None:
    """Remove the oldest runs beyond ``KEPT_RUNS`` and ``KEPT_BYTES``, but none in use."""
    directories = sorted(
        (entry for entry in runs.iterdir() if entry.is_dir()), key=lambda d: d.name, reverse=True
    )
    total_bytes = 0
    for number, directory in enumerate(directories, 1):
        total_bytes += _size(directory)
        if (number > KEPT_RUNS or total_bytes > KEPT_BYTES) and not _in_use(directory):
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
