"""The processors of a rank that goes on alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

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
    # Threads that torch has started keep their processors otherwise.
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended meanwhile
            os.sched_setaffinity(int(task.name), ranks.processors)
    if torch.get_num_threads() == threads:
        torch.set_num_threads(ranks.threads or threads * len(ranks.processors) // own)
