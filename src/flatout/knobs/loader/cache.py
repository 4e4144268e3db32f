"""Samples that are functions of data which have not changed, kept in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import fetch

from flatout.intercept import engagement
from flatout.intercept.containment import attempt
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.loader.purity import ImpureError, examine
from flatout.machine import system

BUDGET_SHARE = 0.25
"""Of the memory that is available at the start, for all samples together."""

DEFAULT_BUDGET_BYTES = 1 << 30
"""Where the system does not say how much memory is available."""

Say = Callable[[str, str], None]


class SampleCache:
    """Stands in for ``_MapDatasetFetcher.fetch``, through which loaders get their batches.

    A sample is kept with a digest of what it is made of, and taken from memory while that is the
    same. Datasets of which this is not known are fetched from as ever.

    Args:
        say: called with ``"noticed"`` or ``"skipped"`` and a sentence.
        on_failure: called when something here failed; the batch is fetched as ever.
        budget_bytes: for all samples together.
    """

    def __init__(
        self, say: Say, on_failure: Callable[[Exception], None], budget_bytes: int | None = None
    ) -> None:
        self._say = say
        self._on_failure = on_failure
        self._budget_bytes = available_bytes() if budget_bytes is None else budget_bytes
        self._stores: WeakIdentityDict[Any, Store] = WeakIdentityDict()

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that.

        What is known stays, in case it is wanted again.
        """
        return wrap_function(fetch._MapDatasetFetcher, "fetch", self._on_failure, self.fetch)

    def fetch(self, own: Callable[[Any, Any], Any], fetcher: Any, index: Any) -> Any:
        """A batch, as the loader's fetcher would make it by its method ``own``."""
        store = self._store(fetcher.dataset)
        if store is None or type(index) is not list or data.get_worker_info() is not None:
            return own(fetcher, index)
        try:
            digests = self._digests(store, fetcher, index)
        except ImpureError as error:
            self._leave(store, str(error))
            return own(fetcher, index)
        samples = []
        for i, digest in zip(index, digests, strict=True):
            kept = store.samples.get(i)
            if kept is not None and kept[0] == digest:
                samples.append(copied(kept[1]))
                engagement.calls["loader"] += 1
            else:
                samples.append(fetcher.dataset[i])
                attempt(self._on_failure, self._keep, store, i, digest, samples[-1])
        return fetcher.collate_fn(samples)

    @property
    def _left_bytes(self) -> int:
        return self._budget_bytes - sum(store.held_bytes for store in self._stores.values())

    def _store(self, dataset: Any) -> Store | None:
        """What is known of a dataset; nothing when it is left alone."""
        store = self._stores.get(dataset)
        if store is None:
            try:
                store = self._stores.setdefault(dataset, Store(type(dataset).__qualname__))
            except TypeError:
                return None  # a list of what is in memory already
        return None if store.is_left else store

    def _digests(self, store: Store, fetcher: Any, indices: Sequence[Any]) -> list[bytes]:
        """Of what the samples at ``indices`` are made of, here and now.

        Raises:
            ImpureError: they are not known to be functions of their index and of data.
        """
        if not fetcher.auto_collation:
            raise ImpureError("its samples are handed out one by one")
        if not all(type(index) is int for index in indices):
            raise ImpureError("its sampler gives other indices than numbers")
        account = examine(fetcher.dataset, fetcher.collate_fn)
        if account.draws or account.opens:
            raise ImpureError(f"it may {'draw random numbers' if account.draws else 'read files'}")
        seal = account.seal + torch.get_num_threads().to_bytes(4, "little")
        if store.seal != seal:
            if store.seal is None:
                self._say("noticed", f"samples of {store.name} are kept")
            self._clear(store)
            store.seal = seal
        return [account.digest((index,)) for index in indices]

    def _keep(self, store: Store, index: int, digest: bytes, sample: Any) -> None:
        if store.is_left:
            return
        if index in store.samples:
            *_, old = store.samples.pop(index)
            store.held_bytes -= old
        size = size_bytes(sample)
        if size > self._left_bytes:
            if not store.is_full:
                store.is_full = True
                self._say("noticed", f"memory for samples is used up by those of {store.name}")
            return
        try:
            store.samples[index] = digest, copied(sample), size
        except UnknownTypeError as error:
            self._leave(store, str(error))
            return
        store.held_bytes += size

    def _leave(self, store: Store, why: str) -> None:
        store.is_left = True
        self._clear(store)
        self._say("skipped", f"the samples of {store.name} are not kept: {why}")

    def _clear(self, store: Store) -> None:
        store.samples.clear()
        store.held_bytes = 0


class Store:
    """What is known of one dataset.

    Args:
        name: of its class.

    Attributes:
        seal: of what all of its samples are made of; see ``Account``.
        samples: by index: digest, sample and size.
        held_bytes: their size.
        is_full: whether there was no memory for a sample.
        is_left: whether the dataset is left alone.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seal: bytes | None = None
        self.samples: dict[int, tuple[bytes, Any, int]] = {}
        self.held_bytes = 0
        self.is_full = False
        self.is_left = False


class UnknownTypeError(Exception):
    """A sample holds what cannot be copied; one sentence."""


_LEAVES = (int, float, complex, bool, str, bytes, type(None))


def copied(sample: Any) -> Any:
    """A copy that shares nothing mutable.

    Raises:
        UnknownTypeError: it holds something of a type that is not known here.
    """
    kind = type(sample)
    if kind in _LEAVES:
        return sample
    if kind is torch.Tensor and sample.layout is torch.strided and not sample.requires_grad:
        return sample.clone()
    if kind is dict:
        return {key: copied(value) for key, value in sample.items()}
    if kind in (list, tuple):
        return kind(map(copied, sample))
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return kind(*map(copied, sample))
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray and not sample.dtype.hasobject:
        return sample.copy()
    if numpy is not None and isinstance(sample, numpy.generic):
        return sample
    raise UnknownTypeError(f"they hold a {kind.__qualname__}, which cannot be copied")


def size_bytes(sample: Any) -> int:
    """About what a sample takes up."""
    if isinstance(sample, dict):
        return sum(map(size_bytes, sample.values())) + sys.getsizeof(sample)
    if isinstance(sample, (list, tuple)):
        return sum(map(size_bytes, sample)) + sys.getsizeof(sample)
    if isinstance(sample, torch.Tensor):
        return sample.nbytes + 256
    return sys.getsizeof(sample)


def available_bytes() -> int:
    """What samples may take up here."""
    available = system.available_bytes()
    return DEFAULT_BUDGET_BYTES if available is None else int(available * BUDGET_SHARE)
