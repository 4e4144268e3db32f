"""Deciding alike in all processes of a job that torch.distributed connects, as under torchrun.

Each process has an agent with the same request. If they train one model with
DistributedDataParallel or a sharded form of it, they wait for each other in every step. So they
must switch settings, and stop, at the same step, although each measures other times: what depends
on times is decided by rank 0, and what has failed in one process counts for all. They tell each
other through the store by which torch.distributed has brought them together.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterable, Iterator
from typing import Any

ANSWER_TIME = datetime.timedelta(seconds=300)
"""How long a process waits for another, which may still compile, or evaluate."""


class Ensemble:
    """The processes of a job.

    Args:
        store: a store of torch.distributed.
        rank, size: of this process, and their number.

    Attributes:
        rank, size: as given.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._exchanges = 0
        self._last_step: int | None = None

    def exchange(self, message: Any) -> list[Any]:
        """Return the messages of all processes, by rank. All must call this in the same order.

        Args:
            message: of this process: numbers, texts, lists and dicts of them.

        Raises:
            RuntimeError: a process does not answer.
        """
        self._exchanges += 1
        names = [f"{self._exchanges}/{rank}" for rank in range(self.size)]
        self._store.set(names[self.rank], json.dumps(message))
        self._store.wait(names, ANSWER_TIME)
        return [json.loads(self._store.get(name)) for name in names]

    def is_last_step(self, step: int, wants_end: bool) -> bool:
        """Return whether all processes stop after a step.

        Rank 0 names the next step as the last one, and another process that has taken that step
        has learned of it, because it has waited for rank 0 in that step.

        Args:
            step: the number of the step that has ended.
            wants_end: whether this process wants to stop as soon as possible.
        """
        if self._last_step is None and self.rank == 0 and wants_end:
            self._last_step = step + 1
            self._store.set("last step", str(self._last_step))
        if self._last_step is None and self._store.check(["last step"]):
            self._last_step = int(self._store.get("last step"))
        return self._last_step is not None and step >= self._last_step


def find(roots: Iterable[Any]) -> Ensemble | None:
    """Return the processes of the job once they wait for each other in every step; ``None``: they
    do not, or not yet.

    Args:
        roots: the modules that this process has called outermost.
    """
    from torch import distributed

    if not any(_LOCKSTEP.intersection(_names(root)) for root in roots):
        return None
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    size = distributed.get_world_size()
    if size == 1:
        return None
    return _connect(distributed.get_rank(), size)


_LOCKSTEP = frozenset(("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"))
"""Classes of torch whose modules wait in every backward pass for those of the other processes."""


def _names(module: Any) -> Iterator[str]:
    return (base.__name__ for base in type(module).__mro__ if base.__module__.startswith("torch."))


@functools.cache
def _connect(rank: int, size: int) -> Ensemble:
    from torch import distributed

    store = distributed.distributed_c10d._get_default_store()
    return Ensemble(distributed.PrefixStore("flatout", store), rank, size)  # type: ignore[attr-defined]
