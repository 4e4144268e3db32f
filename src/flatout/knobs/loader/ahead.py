"""Batches of loaders without worker processes, fetched ahead while the step computes."""

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

from flatout.intercept import engagement
from flatout.intercept.containment import attempt
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.loader.processes import CHANGING, MOST_INDICES, Process, Ticket, state_of
from flatout.knobs.loader.purity import Account, ImpureError, examine

MOST_MISSES = 3
"""Batches that may be fetched for nothing before a dataset is judged by ``USEFUL``."""

USEFUL = 4
"""Batches that must be of use for each that is not."""

MOST_POOLS = 2
"""Datasets that have processes at the same time: one to train on, one to evaluate on."""

_SAMPLERS: dict[Any, Any] = {
    kind: kind.__iter__
    for kind in (
        *(data.BatchSampler, data.SequentialSampler, data.RandomSampler),
        *(data.WeightedRandomSampler, data.DistributedSampler),
    )
}
"""Those that settle the order of an epoch as it begins: asked early, they say the same."""


class Ahead:
    """Stands in for ``_SingleProcessDataLoaderIter._next_data``.

    The loader's iterator stays torch's, with all that it draws and raises. Its next indices are
    drawn early, and forks of the program fetch these samples. A batch is handed out if its samples
    would be made of the same here and now as they were made of there. Otherwise the indices are put
    back, and the batch is fetched as ever.

    Args:
        count: forks for a dataset.
        say: called with ``"noticed"`` or ``"skipped"`` and a sentence.
        on_failure: called when something here failed; the batch is fetched as ever.
        may_draw: whether datasets that draw random numbers are fetched from as well; they draw
            others then.
    """

    def __init__(
        self,
        count: int,
        say: Callable[[str, str], None],
        on_failure: Callable[[Exception], None],
        *,
        may_draw: bool,
    ) -> None:
        self._count = count
        self._say = say
        self._on_failure = on_failure
        self._may_draw = may_draw
        self._has_failed = False
        self._pools: WeakIdentityDict[Any, _Pool] = WeakIdentityDict()
        self._queues: weakref.WeakKeyDictionary[Any, _Queue | None] = weakref.WeakKeyDictionary()

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that."""
        owner = dataloader._SingleProcessDataLoaderIter
        with contextlib.ExitStack() as undo:
            undo.callback(self._stop)
            undo.callback(wrap_function(owner, "_next_data", self._failed, self.next))
            return undo.pop_all().close

    def _stop(self) -> None:
        """The iterators go on from where they are without this."""
        for iterator, queue in list(self._queues.items()):
            if queue is not None:
                queue.put_back(iterator)
        self._queues.clear()
        for pool in self._pools.values():
            pool.end()

    def next(self, own: Callable[[Any], Any], iterator: Any) -> Any:
        """The next batch, as the iterator would make it by its method ``own``.

        Raises:
            StopIteration: there is none.
        """
        if self._has_failed and iterator not in self._queues:
            return own(iterator)
        if iterator not in self._queues:
            self._queues[iterator] = None
            self._queues[iterator] = attempt(self._failed, self._begin, iterator)
        queue = self._queues[iterator]
        if queue is None:
            return own(iterator)
        while queue.left and queue.wants_more:
            try:
                index = next(queue.rest)
            except Exception as error:  # noqa: BLE001 - the sampler's: it is raised in its turn
                queue.left = 0
                if not isinstance(error, StopIteration):
                    queue.rest = _raising(error)
                queue.order(iterator)
                break
            queue.left -= 1
            queue.waiting.append((index, None))
            queue.order(iterator)
            queue.waiting[-1] = index, attempt(self._failed, self._ask, iterator, index)
        batch = None
        if queue.waiting and not queue.is_cut_otherwise(iterator):
            batch = attempt(self._failed, self._take, iterator, queue)
        if batch is None:
            queue.put_back(iterator)
            queue.left -= queue.left > 0
            if queue.pool.is_left or self._has_failed:
                self._queues[iterator] = None
            return own(iterator)
        engagement.calls["loader"] += 1
        queue.waiting.popleft()
        queue.order(iterator)
        if iterator._pin_memory:
            batch = _utils.pin_memory.pin_memory(batch, iterator._pin_memory_device)
        return batch

    def _failed(self, error: Exception) -> None:
        """From now on, torch's iterators go on by themselves: each has its indices in order."""
        self._has_failed = True
        self._queues.clear()
        self._on_failure(error)

    def _begin(self, iterator: Any) -> _Queue | None:
        """What an iterator will have ahead of it; nothing if it is left alone."""
        dataset = iterator._dataset
        pool = self._pools.get(dataset)
        if pool is None:
            try:
                pool = self._pools.setdefault(dataset, _Pool(type(dataset).__qualname__))
            except TypeError:
                return None  # a list, say: nothing to wait for
        if pool.is_left:
            return None
        try:
            if iterator._dataset_kind != dataloader._DatasetKind.Map:
                raise ImpureError("it is iterable")
            count = batches_drawn_early(iterator._index_sampler)
        except ImpureError as error:
            self._tell(pool, str(error))  # another loader of it may have another sampler
            return None
        try:
            account = self._examined(iterator)
        except ImpureError as error:
            self._leave(pool, str(error))
            return None
        user = pool.user()
        its_queue = None if user is None else self._queues.get(user)
        if its_queue is not None and (its_queue.waiting or its_queue.left):
            return None  # two iterators of it at once: the second one fetches for itself
        pool.user = weakref.ref(iterator)
        pool.forget()
        if pool.seal != account.seal:
            pool.end()
        return _Queue(pool, count, iterator)

    def _examined(self, iterator: Any) -> Account:
        """What the samples are made of, here and now.

        Raises:
            ImpureError: that is not known, or no one else may fetch them.
        """
        account = examine(iterator._dataset, iterator._collate_fn)
        if account.draws and not self._may_draw:
            raise ImpureError("it may draw random numbers")
        return account

    def _leave(self, pool: _Pool, why: str) -> None:
        pool.end()
        pool.is_left = True
        self._tell(pool, why)

    def _tell(self, pool: _Pool, why: str) -> None:
        if why not in pool.told:
            pool.told.add(why)
            self._say("skipped", f"{pool.name} is not fetched from ahead: {why}")

    def _ask(self, iterator: Any, index: list[int]) -> Ticket | None:
        """Let a process fetch a batch; nothing: none will."""
        pool = self._pools.get(iterator._dataset)
        assert pool is not None
        if pool.is_left or not index or len(index) > MOST_INDICES:
            return None
        try:
            if not pool.is_alive:
                for other in self._pools.values() if self._is_crowded() else ():
                    other.end()
                pool.begin(iterator, self._examined(iterator), self._count)
                if not pool.is_known:
                    pool.is_known = True
                    self._say("noticed", f"batches of {pool.name} are fetched ahead")
            return pool.ask(index)
        except (ImpureError, OSError) as error:
            self._leave(pool, str(error))
            return None

    def _is_crowded(self) -> bool:
        return sum(pool.is_alive for pool in self._pools.values()) >= MOST_POOLS

    def _take(self, iterator: Any, queue: _Queue) -> Any:
        """The batch that is next; nothing: it has to be fetched here and now."""
        pool = queue.pool
        index, ticket = queue.waiting[0]
        if ticket is None or not pool.is_alive:
            return None
        try:
            digest = self._examined(iterator).digest(index)
            answer = ticket.process.take(ticket)
        except (ImpureError, EOFError, OSError, TimeoutError) as error:
            self._leave(pool, str(error) or "a process that fetches has ended")
            return None
        if answer.digest == digest and all(state_of(path) == was for path, was in answer.files):
            pool.hits += 1
            return ticket.process.taken(ticket, answer)
        if answer.why == CHANGING:
            return None
        if answer.digest != digest:
            pool.end()  # what is new here, they do not know
        pool.misses += 1
        if pool.misses >= MOST_MISSES and pool.hits < USEFUL * pool.misses:
            self._leave(pool, answer.why or "its data change again and again while it is read")
        return None


class _Queue:
    """What an iterator has ahead of it.

    Attributes:
        pool: that fetches.
        left: batches that may still be drawn early.
        rest: draws them.
        waiting: indices, and who was asked for their batch, in their order.
    """

    def __init__(self, pool: _Pool, left: int, iterator: Any) -> None:
        self.pool = pool
        self.left = left
        self.waiting: deque[tuple[list[int], Ticket | None]] = deque()
        self.rest: Iterator[list[int]] = iterator._sampler_iter
        self._batch_size = iterator._index_sampler.batch_size

    @property
    def wants_more(self) -> bool:
        """Whether to draw another batch early; one is drawn in any case."""
        return not self.waiting or (self.waiting[-1][1] is not None and self.pool.has_room)

    def is_cut_otherwise(self, iterator: Any) -> bool:
        """Whether the program has set another batch size since."""
        sampler = iterator._index_sampler
        return not sampler.drop_last and bool(sampler.batch_size != self._batch_size)

    def order(self, iterator: Any) -> None:
        """Let the iterator draw what was drawn early, should it be asked without this queue."""
        early = [index for index, _ in self.waiting]
        iterator._sampler_iter = itertools.chain(early, self.rest)

    def put_back(self, iterator: Any) -> None:
        """Let the iterator draw again what was drawn early."""
        early = [index for index, _ in self.waiting]
        self.waiting.clear()
        self.left += len(early)
        if early:
            self.pool.forget()
        if self.is_cut_otherwise(iterator):
            self.left = 0
            flat = [index for batch in early for index in batch]
            iterator._sampler_iter = _cut(flat, self.rest, iterator._index_sampler)
        self.rest = iterator._sampler_iter


def _raising(error: Exception) -> Iterator[list[int]]:
    """Raises an error."""
    raise error
    yield []


def _cut(early: list[int], rest: Iterator[list[int]], sampler: Any) -> Iterator[list[int]]:
    """Batches of the size that the sampler has when each is asked for."""
    while True:
        while len(early) < sampler.batch_size and (batch := next(rest, None)):
            early += batch
        if not early:
            return
        size = sampler.batch_size
        yield early[:size]
        del early[:size]


class _Pool:
    """Forks that fetch from one dataset.

    Args:
        name: of the dataset's class.

    Attributes:
        seal: see ``Account``: of what they know.
        user: the iterator that they fetch for.
        hits, misses: batches that were of use, and that were fetched for nothing.
        is_left: whether the dataset is left alone.
        is_known: whether the record says that batches are fetched ahead.
        told: why they are not, as the record says.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seal = b""
        self.user: Callable[[], Any] = lambda: None
        self.hits = self.misses = 0
        self.is_left = self.is_known = False
        self.told: set[str] = set()
        self._processes: list[Process] = []
        self._pid = 0

    @property
    def is_alive(self) -> bool:
        """Whether there are processes, and they are this one's."""
        return bool(self._processes) and self._pid == os.getpid()

    @property
    def has_room(self) -> bool:
        """Whether another batch may be asked for."""
        return self.is_alive and any(process.free for process in self._processes)

    def begin(self, iterator: Any, account: Account, count: int) -> None:
        """Fork.

        Raises:
            OSError: that is not possible.
        """
        self.end()
        self.seal = account.seal
        self._pid = os.getpid()
        for number in range(count):
            self._processes.append(
                Process(iterator._dataset_fetcher, account, iterator._base_seed + number)
            )

    def ask(self, index: list[int]) -> Ticket | None:
        """Let the one that has least to do fetch a batch."""
        process = max(self._processes, key=lambda process: len(process.free))
        return process.ask(index) if process.free else None

    def forget(self) -> None:
        """No one asks any more for what is on its way."""
        if self.is_alive:
            for process in self._processes:
                process.forget()

    def end(self) -> None:
        """End all processes."""
        for process in self._processes:
            process.end()
        self._processes = []


def batches_drawn_early(sampler: Any) -> int:
    """How many batches of indices may be drawn early from what a loader draws them from.

    Raises:
        ImpureError: none, since others could be drawn later.
    """
    inner = getattr(sampler, "sampler", None)
    kinds = type(sampler), type(inner)
    if kinds[0] is not data.BatchSampler or kinds[1] not in _SAMPLERS:
        raise ImpureError("its sampler is not one of torch's that settles the order beforehand")
    if any(vars(kind).get("__iter__") is not _SAMPLERS[kind] for kind in kinds):
        raise ImpureError("the program has changed torch's samplers")
    generator = getattr(inner, "generator", None)
    if generator is not None and getattr(inner, "replacement", False):
        raise ImpureError("its sampler draws from a generator of the program all along")
    # RandomSampler draws from the program's generator once more as it comes to its end.
    return len(sampler) - (generator is not None)
