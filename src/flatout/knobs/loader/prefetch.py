"""Batches of loaders without worker processes, fetched by a thread while the step computes."""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import _utils, dataloader

from flatout.agent.place import take_place
from flatout.knobs import Undo
from flatout.knobs.loader.cache import random_states

AHEAD = 2
"""Batches that are fetched before they are asked for."""

CALM_AFTER = 2
"""Batches of a dataset that must have come without random numbers first."""


class Prefetch:
    """Stands in for ``_SingleProcessDataLoaderIter._next_data``.

    Args:
        say: called with ``"skipped"`` and a sentence.
    """

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._say = say
        self._calm: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._aheads: weakref.WeakKeyDictionary[Any, _Ahead] = weakref.WeakKeyDictionary()
        self._thread: ThreadPoolExecutor | None = None
        self._pid = 0
        self._is_removed = False
        self._own: Callable[[Any], Any] = dataloader._SingleProcessDataLoaderIter._next_data

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that.

        Nothing more is fetched ahead then; what has been is still handed out, in its order.
        """
        owner = dataloader._SingleProcessDataLoaderIter
        self._own = owner._next_data
        self._give_back = take_place(owner, "_next_data", lambda iterator: self.next(iterator))

        def undo() -> None:
            self._is_removed = True
            if not self._aheads:
                self._end()

        return undo

    def _end(self) -> None:
        self._give_back()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.shutdown(wait=False)

    def next(self, iterator: Any) -> Any:
        """The next batch.

        Raises:
            StopIteration: there is none.
        """
        ahead = self._aheads.get(iterator)
        if ahead is None:
            calm = None if self._is_removed else self._calmness(iterator)
            if calm is None:
                return self._own(iterator)
            if calm < CALM_AFTER:
                return self._watched(iterator, calm)
            ahead = self._aheads[iterator] = _Ahead()
        while not self._is_removed and ahead.end is None and len(ahead.batches) < AHEAD:
            try:
                index = iterator._next_index()
            except Exception as error:  # noqa: BLE001 - raised in its turn
                ahead.end = error
            else:
                ahead.batches.append(self._submit(_fetch, iterator, index, torch.is_grad_enabled()))
        if ahead.batches:
            return ahead.batches.popleft().result()
        if ahead.end is not None:
            raise ahead.end
        self._aheads.pop(iterator)
        if self._is_removed and not self._aheads:
            self._end()
        return self._own(iterator)

    def _submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        if self._thread is None or self._pid != os.getpid():
            self._thread = ThreadPoolExecutor(1, "flatout-prefetch", torch.set_num_threads, (1,))
            self._pid = os.getpid()
        return self._thread.submit(function, *args)

    def _calmness(self, iterator: Any) -> int | None:
        """How many batches came without random numbers; nothing if the dataset is left alone."""
        if iterator._dataset_kind != dataloader._DatasetKind.Map:
            return None
        try:
            calm = self._calm.setdefault(iterator._dataset, 0)
        except TypeError:
            return None  # a list, say: nothing to wait for
        return None if calm == _DRAWS else calm

    def _watched(self, iterator: Any, calm: int) -> Any:
        """A batch fetched here and now."""
        index = iterator._next_index()
        before = random_states()
        batch = _fetch(iterator, index, torch.is_grad_enabled())
        if random_states() == before:
            self._calm[iterator._dataset] = calm + 1
        else:
            self._calm[iterator._dataset] = _DRAWS
            name = type(iterator._dataset).__qualname__
            self._say("skipped", f"{name} is not fetched from ahead: it draws random numbers")
        return batch


_DRAWS = -1


class _Ahead:
    """What one iterator has ahead of it.

    Attributes:
        batches: that are being fetched, in their order.
        end: what the sampler ended with.
    """

    def __init__(self) -> None:
        self.batches: deque[Future[Any]] = deque()
        self.end: BaseException | None = None


def _fetch(iterator: Any, index: Any, is_grad_enabled: bool) -> Any:
    with torch.set_grad_enabled(is_grad_enabled):
        batch = iterator._dataset_fetcher.fetch(index)
    if iterator._pin_memory:
        batch = _utils.pin_memory.pin_memory(batch, iterator._pin_memory_device)
    return batch
