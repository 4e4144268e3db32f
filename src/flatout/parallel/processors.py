"""The processors of a rank that computes while the others do not."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from flatout.parallel.place import Place
from flatout.wire.request import Ranks


def use_all(ranks: Ranks, threads: int | None) -> None:
    """Let this process run on the processors of all ranks, with as many threads as without ranks.

    Args:
        ranks: the ranks, whose processors may not be known.
        threads: the number of threads of this process as one of them; ``None``: a setting has
            chosen it, and it stays, as does a number that the program has set since.
    """
    if not ranks.processors:
        return
    own = len(os.sched_getaffinity(0))
    for task in _tasks():
        _pin(task, ranks.processors)
    if torch.get_num_threads() == threads:
        torch.set_num_threads(ranks.threads or threads * len(ranks.processors) // own)


@contextlib.contextmanager
def lend(ranks: Ranks | None, place: Place, threads: int | None) -> Iterator[None]:
    """A context in which this process runs on the processors of all ranks, if they are on one host
    and flatout has chosen those of each.

    Args:
        ranks, threads: as for ``use_all``.
        place: of this process.
    """
    if ranks is None or not place.has_common_directory:
        yield
        return
    own, threads_before = os.sched_getaffinity(0), torch.get_num_threads()
    pinned = {}
    for task in _tasks():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            pinned[task] = os.sched_getaffinity(task)
    use_all(ranks, threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)
        for task in _tasks():
            _pin(task, pinned.get(task, own))


def _tasks() -> list[int]:
    """The threads of this process: those that torch has started keep their own processors."""
    return [int(task.name) for task in Path("/proc/self/task").iterdir()]


def _pin(task: int, processors: Collection[int]) -> None:
    with contextlib.suppress(OSError):  # it has ended meanwhile
        os.sched_setaffinity(task, processors)
