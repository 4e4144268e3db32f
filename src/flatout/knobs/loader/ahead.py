"""Prefetch the batches of loaders without workers in forked processes while the step computes."""

from __future__ import annotations

import contextlib
import itertools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import data
from torch.utils.data import _utils, dataloader

from flatout.intercept import handled_calls
from flatout.intercept.containment import attempt
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, wrap_function
from flatout.intercept.purity import Account, ImpureError, examine
from flatout.knobs.loader.processes import CHANGING, MOST_INDICES, Process, Ticket, state_of

MOST_MISSES = 3
"""A dataset is judged by ``USEFUL`` once this many batches have been prefetched in vain."""

USEFUL = 4
"""Minimum number of prefetched batches that must be used for each one that is not."""

MOST_POOLS = 2
"""Maximum number of datasets with processes: one for training, one for evaluation."""

_SAMPLERS: dict[Any, Any] = {
    kind: kind.__iter__
    for kind in (
        *(data.BatchSampler, data.SequentialSampler, data.RandomSampler),
        *(data.WeightedRandomSampler, data.DistributedSampler),
    )
}
"""The samplers that fix the order of an epoch as it begins, with their ``__iter__``; asking them
early gives the same indices."""


class Ahead:
    """Replaces ``_SingleProcessDataLoaderIter._next_data``.

    The loader's iterator is still torch's, including the random numbers that it draws and the
    exceptions that it raises. Its next indices are drawn early, and forks of the program fetch
    these samples. The program gets such a batch if the data that its samples depend on are the same
    in both processes. Otherwise the indices are put back, and torch fetches the batch.

    Args:
        count: the number of processes for each dataset.
        add_event: called with ``"noticed"`` or ``"skipped"`` and a clause for the record.
        on_failure: called with the exception if this fails; torch then fetches the batch.
        may_draw: whether to prefetch from datasets that draw random numbers, which then come from
            the generators of the processes.
    """

    def __init__(
        self,
        count: int,
        add_event: Callable[[str, str], None],
        on_failure: Callable[[Exception], None],
        *,
        may_draw: bool,
    ) -> None:
        self._count = count
        self._add_event = add_event
        self._on_failure = on_failure
        self._may_draw = may_draw
        self._has_failed = False
        self._pools: WeakIdentityDict[Any, _Pool] = WeakIdentityDict()
        self._queues: weakref.WeakKeyDictionary[Any, _Queue | None] = weakref.WeakKeyDictionary()

    def install(self) -> Undo:
        """Replace torch's method; returns the undo."""
        owner = dataloader._SingleProcessDataLoaderIter
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            undo.callback(wrap_function(owner, "_next_data", self._handle_failure, self.next))
            return undo.pop_all().close

    def _stop(self) -> None:
        """Let the iterators continue without prefetching from where they are, and end processes."""
        for iterator, queue in list(self._queues.items()):
            if queue is not None:
                queue.put_back(iterator)
        self._queues.clear()
        for pool in self._pools.values():
            pool.end()

    def next(self, original: Callable[[Any], Any], iterator: Any) -> Any:
        """Return the next batch, prefetched or fetched by the iterator's method ``original``.

        Raises:
            StopIteration: there is none.
        """
        if self._has_failed and iterator not in self._queues:
            return original(iterator)
        if iterator not in self._queues:
            self._queues[iterator] = None
            self._queues[iterator] = attempt(self._handle_failure, self._make_queue, iterator)
        queue = self._queues[iterator]
        if queue is None:
            return original(iterator)
        self._fill(queue, iterator)
        batch = None
        if queue.waiting and not queue.has_new_batch_size(iterator):
            batch = attempt(self._handle_failure, self._receive, iterator, queue)
        if batch is None:
            queue.put_back(iterator)
            queue.left -= queue.left > 0
            if queue.pool.is_left_alone or self._has_failed:
                self._queues[iterator] = None
            return original(iterator)
        handled_calls.counts["loader"] += 1
        queue.waiting.popleft()
        queue.restore_indices(iterator)
        if iterator._pin_memory:
            batch = _utils.pin_memory.pin_memory(batch, iterator._pin_memory_device)
        return batch

    def _fill(self, queue: _Queue, iterator: Any) -> None:
        """Draw indices early and request their batches, while processes have free slots."""
        while queue.left and queue.wants_more:
            try:
                index = next(queue.rest)
            except Exception as error:  # noqa: BLE001 - the sampler's; it is raised when it is due
                queue.left = 0
                if not isinstance(error, StopIteration):
                    queue.rest = _raising(error)
                queue.restore_indices(iterator)
                return
            queue.left -= 1
            queue.waiting.append((index, None))
            # As ``restore_indices`` does, but without a call that could fail and lose the index.
            iterator._sampler_iter = itertools.chain([i for i, _ in queue.waiting], queue.rest)
            ticket = attempt(self._handle_failure, self._request, iterator, index)
            queue.waiting[-1] = index, ticket

    def _handle_failure(self, error: Exception) -> None:
        """Let torch's iterators continue by themselves; each has its indices in order."""
        self._has_failed = True
        self._queues.clear()
        self._on_failure(error)

    def _make_queue(self, iterator: Any) -> _Queue | None:
        """The queue of a new iterator; ``None`` if the iterator is left alone."""
        dataset = iterator._dataset
        pool = self._pools.get(dataset)
        if pool is None:
            try:
                pool = self._pools.setdefault(dataset, _Pool(type(dataset).__qualname__))
            except TypeError:
                return None  # it is a list or the like, whose samples are in memory
        if pool.is_left_alone:
            return None
        try:
            if iterator._dataset_kind != dataloader._DatasetKind.Map:
                raise ImpureError("it is an iterable-style dataset")
            count = batches_drawn_early(iterator._index_sampler)
        except ImpureError as error:
            self._report(pool, str(error))  # another loader of it may have another sampler
            return None
        try:
            account = self._examine(iterator)
        except ImpureError as error:
            self._leave_alone(pool, str(error))
            return None
        user = pool.user()
        user_queue = None if user is None else self._queues.get(user)
        if user_queue is not None and (user_queue.waiting or user_queue.left):
            return None  # of two simultaneous iterators of a dataset, only the first prefetches
        pool.user = weakref.ref(iterator)
        pool.forget_requests()
        if pool.seal != account.seal:
            pool.end()
        return _Queue(pool, count, iterator)

    def _examine(self, iterator: Any) -> Account:
        """Find out what the samples depend on now.

        Raises:
            ImpureError: that is not known, or only the program may fetch them.
        """
        account = examine(iterator._dataset, iterator._collate_fn)
        if account.draws and not self._may_draw:
            raise ImpureError("it may draw random numbers")
        return account

    def _leave_alone(self, pool: _Pool, why: str) -> None:
        pool.end()
        pool.is_left_alone = True
        self._report(pool, why)

    def _report(self, pool: _Pool, why: str) -> None:
        if why not in pool.reported:
            pool.reported.add(why)
            self._add_event("skipped", f"{pool.name} is not prefetched: {why}")

    def _request(self, iterator: Any, index: list[int]) -> Ticket | None:
        """Let a process fetch a batch; ``None`` if no process does."""
        pool = self._pools.get(iterator._dataset)
        assert pool is not None
        if pool.is_left_alone or not index or len(index) > MOST_INDICES:
            return None
        try:
            if not pool.is_alive:
                for other in self._pools.values() if self._is_crowded() else ():
                    other.end()
                pool.start(iterator, self._examine(iterator), self._count)
                if not pool.is_recorded:
                    pool.is_recorded = True
                    self._add_event("noticed", f"batches of {pool.name} are prefetched")
            return pool.request(index)
        except (ImpureError, OSError) as error:
            self._leave_alone(pool, str(error))
            return None

    def _is_crowded(self) -> bool:
        return sum(pool.is_alive for pool in self._pools.values()) >= MOST_POOLS

    def _receive(self, iterator: Any, queue: _Queue) -> Any:
        """The next prefetched batch; ``None`` if the program has to fetch it."""
        pool = queue.pool
        index, ticket = queue.waiting[0]
        if ticket is None or not pool.is_alive:
            return None
        try:
            digest = self._examine(iterator).digest(index)
            answer = ticket.process.receive(ticket)
        except (ImpureError, EOFError, OSError, TimeoutError) as error:
            self._leave_alone(pool, str(error) or "a process that prefetches has ended")
            return None
        if answer.digest == digest and all(state_of(path) == was for path, was in answer.files):
            pool.hits += 1
            return ticket.process.unpack(ticket, answer)
        if answer.why == CHANGING:
            return None
        if answer.digest != digest:
            pool.end()  # the processes have old data
        pool.misses += 1
        if pool.misses >= MOST_MISSES and pool.hits < USEFUL * pool.misses:
            why = answer.why or "its data change again and again while it is read"
            self._leave_alone(pool, why)
        return None


class _Queue:
    """The batches that have been requested for an iterator.

    Attributes:
        pool: the processes that fetch them.
        left: how many batches may still be drawn early.
        rest: the iterator from which their indices are drawn.
        waiting: the indices of each batch and its request, in order.
    """

    def __init__(self, pool: _Pool, left: int, iterator: Any) -> None:
        self.pool = pool
        self.left = left
        self.waiting: deque[tuple[list[int], Ticket | None]] = deque()
        self.rest: Iterator[list[int]] = iterator._sampler_iter
        self._batch_size = iterator._index_sampler.batch_size

    @property
    def wants_more(self) -> bool:
        """Whether to draw another batch early; at least one is always drawn."""
        return not self.waiting or (self.waiting[-1][1] is not None and self.pool.has_free_slot)

    def has_new_batch_size(self, iterator: Any) -> bool:
        """Whether the program has changed the batch size since the iterator began."""
        sampler = iterator._index_sampler
        return not sampler.drop_last and bool(sampler.batch_size != self._batch_size)

    def restore_indices(self, iterator: Any) -> None:
        """Let the iterator yield the indices drawn early, in case it goes on without this queue."""
        early = [index for index, _ in self.waiting]
        iterator._sampler_iter = itertools.chain(early, self.rest)

    def put_back(self, iterator: Any) -> None:
        """Give up all requests, and let the iterator yield their indices again."""
        early = [index for index, _ in self.waiting]
        self.waiting.clear()
        self.left += len(early)
        if early:
            self.pool.forget_requests()
        if self.has_new_batch_size(iterator):
            self.left = 0
            flat = [index for batch in early for index in batch]
            iterator._sampler_iter = _rebatch(flat, self.rest, iterator._index_sampler)
        self.rest = iterator._sampler_iter


def _raising(error: Exception) -> Iterator[list[int]]:
    """An iterator that raises an error."""
    raise error
    yield []


def _rebatch(early: list[int], rest: Iterator[list[int]], sampler: Any) -> Iterator[list[int]]:
    """Yield batches of the size that the sampler has at the time when each is drawn."""
    while True:
        while len(early) < sampler.batch_size and (batch := next(rest, None)):
            early += batch
        if not early:
            return
        size = sampler.batch_size
        yield early[:size]
        del early[:size]


class _Pool:
    """The processes that fetch from one dataset.

    Args:
        name: the name of the dataset's class.

    Attributes:
        seal: the digest of what all samples depend on in the processes; see ``Account``.
        user: a weak reference to the iterator for which they fetch.
        hits, misses: how many prefetched batches were used, and were not.
        is_left_alone: whether the dataset is not prefetched.
        is_recorded: whether the record says that the dataset is prefetched.
        reported: the reasons in the record why it is not.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seal = b""
        self.user: Callable[[], Any] = lambda: None
        self.hits = self.misses = 0
        self.is_left_alone = self.is_recorded = False
        self.reported: set[str] = set()
        self._processes: list[Process] = []
        self._pid = 0

    @property
    def is_alive(self) -> bool:
        """Whether there are processes, and this process has started them."""
        return bool(self._processes) and self._pid == os.getpid()

    @property
    def has_free_slot(self) -> bool:
        """Whether another batch may be requested."""
        return self.is_alive and any(process.free_slots for process in self._processes)

    def start(self, iterator: Any, account: Account, count: int) -> None:
        """Fork ``count`` processes.

        Raises:
            OSError: a process cannot be forked.
        """
        self.end()
        self.seal = account.seal
        self._pid = os.getpid()
        for number in range(count):
            self._processes.append(
                Process(iterator._dataset_fetcher, account, iterator._base_seed + number)
            )

    def request(self, index: list[int]) -> Ticket | None:
        """Let the process with the most free slots fetch a batch; ``None`` if there is none."""
        process = max(self._processes, key=lambda process: len(process.free_slots))
        return process.request(index) if process.free_slots else None

    def forget_requests(self) -> None:
        """Give up all requests."""
        if self.is_alive:
            for process in self._processes:
                process.forget_requests()

    def end(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.end()
        self._processes = []


def batches_drawn_early(sampler: Any) -> int:
    """Return how many batches of indices may be drawn early from a loader's batch sampler.

    Raises:
        ImpureError: none, because drawing them later could give others.
    """
    inner = getattr(sampler, "sampler", None)
    kinds = type(sampler), type(inner)
    if kinds[0] is not data.BatchSampler or kinds[1] not in _SAMPLERS:
        raise ImpureError("its sampler is not one of torch's that fix the order of an epoch")
    if any(vars(kind).get("__iter__") is not _SAMPLERS[kind] for kind in kinds):
        raise ImpureError("the program has changed torch's samplers")
    generator = getattr(inner, "generator", None)
    if generator is not None and getattr(inner, "replacement", False):
        raise ImpureError("its sampler draws from the program's generator during the epoch")
    # RandomSampler draws from the program's generator once more at the end of an epoch.
    return len(sampler) - (generator is not None)
