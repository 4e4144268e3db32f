"""The place of this process among the ranks of a job, as the launcher has put it there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from flatout.wire.request import ADDRESS_VARIABLE, RANK_VARIABLE, RANKS_VARIABLE, RUN_VARIABLE


@dataclass(frozen=True)
class Place:
    """The place of a process among the ranks.

    Attributes:
        rank: from 0; rank 0 is the program that the user sees.
        size: number of ranks, at least two.
        run_directory: where the ranks find each other.
        address: of this host, at which the other ranks reach this one.
        has_common_directory: whether the run directory is that of all ranks, which then are on one
            host.
    """

    rank: int
    size: int
    run_directory: Path
    address: str = "127.0.0.1"
    has_common_directory: bool = True


def launched_processes() -> int:
    """Return how many processes torchrun, or what starts programs as it does, has made of the
    program; 1 if none has."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1


def place() -> Place | None:
    """Return the place of this process, ``None`` if the job has no ranks beside it."""
    values = [os.environ.get(name, "") for name in (RANK_VARIABLE, RANKS_VARIABLE)]
    if not all(map(str.isdecimal, values)):
        return None
    rank, size = map(int, values)
    if size < 2 or rank >= size:
        return None
    run_directory = Path(os.environ[RUN_VARIABLE])
    address = os.environ.get(ADDRESS_VARIABLE)
    if address is None:
        return Place(rank, size, run_directory)
    return Place(rank, size, run_directory, address, has_common_directory=False)
