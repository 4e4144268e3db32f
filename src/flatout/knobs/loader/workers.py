"""Worker processes for loaders, kept from one epoch to the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import dataloader

from flatout.agent import device
from flatout.agent.place import take_place
from flatout.knobs import Undo

PREFETCH_FACTOR = 4
"""Batches that each worker is ahead: samples that take longer than others hold up nobody."""


class Workers:
    """Stands in for ``DataLoader._get_iterator``.

    Args:
        count: of workers for a loader that has none.
        say: called with ``"skipped"`` and a sentence.
    """

    def __init__(self, count: int, say: Callable[[str, str], None]) -> None:
        self._count = count
        self._say = say
        self._left: weakref.WeakSet[Any] = weakref.WeakSet()
        self._kept: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
        self._own: Callable[[Any], Any] = dataloader.DataLoader._get_iterator

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that.

        Iterators that are under way go on then; workers that wait for another epoch end.
        """
        self._own = dataloader.DataLoader._get_iterator
        give_back = take_place(
            dataloader.DataLoader, "_get_iterator", lambda loader: self.iterator(loader)
        )

        def undo() -> None:
            give_back()
            self._kept.clear()

        return undo

    def iterator(self, loader: Any) -> Any:
        """An iterator with workers, that of the last epoch if that may be used again."""
        if loader._dataset_kind != dataloader._DatasetKind.Map:
            if loader not in self._left:
                self._left.add(loader)
                name = type(loader.dataset).__qualname__
                self._say("skipped", f"{name} is iterable: each worker would repeat all of it")
            return self._own(loader)
        if dataloader.get_worker_info() is not None or loader.persistent_workers:
            return self._own(loader)
        state = state_of(loader.dataset)
        kept = self._kept.get(loader)
        if kept is not None:
            iterator, its_state = kept
            if its_state == state and is_over(iterator):
                draw_base_seed(loader)
                iterator._reset(loader, first_iter=False)
                return iterator
            self._kept.pop(loader)
        iterator = self._make(loader)
        self._kept[loader] = iterator, state
        return iterator

    def _make(self, loader: Any) -> Any:
        """An iterator of a loader that has other settings while it is made."""
        settings = loader.__dict__
        changed: dict[str, Any] = {"persistent_workers": True}
        if not loader.num_workers:
            changed |= {"num_workers": self._count, "prefetch_factor": PREFETCH_FACTOR}
        if device.has_cuda():
            changed["pin_memory"] = True
        before = {name: settings[name] for name in changed}
        settings.update(changed)
        try:
            return self._own(loader)
        finally:
            settings.update(before)


def is_over(iterator: Any) -> bool:
    """Whether all of its batches have been handed out, and its workers live."""
    return iterator._rcvd_idx >= iterator._send_idx and not iterator._shutdown


def draw_base_seed(loader: Any) -> None:
    """Draw the seed of the workers that a new iterator would: what is drawn next stays the same."""
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)


def state_of(dataset: Any) -> Any:
    """What may have been set on a dataset between epochs: workers have a copy of it.

    Plain values by value, everything else by identity.
    """
    plain = (int, float, str, bytes, bool, type(None))
    own = getattr(dataset, "__dict__", {})
    return {name: value if isinstance(value, plain) else id(value) for name, value in own.items()}
