"""What rank 0 does with the cores of the other ranks once it goes on alone."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch


def take_processors(processors: Sequence[int], threads: int) -> None:
    """Let this process run on the processors of all ranks, with threads to match.

    What the program has chosen by itself stays: a thread that it has bound to processors, and the
    number of torch's threads.

    Args:
        processors: their numbers.
        threads: how many torch has used at the start of the program, on this rank's share.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    share = os.sched_getaffinity(0)
    for entry in os.listdir("/proc/self/task"):
        try:
            if os.sched_getaffinity(int(entry)) == share:
                os.sched_setaffinity(int(entry), processors)
        except ProcessLookupError:  # a thread that has ended meanwhile
            continue
    if torch.get_num_threads() == threads:
        torch.set_num_threads(max(1, threads * len(processors) // len(share)))
