"""Keep samples in memory and reuse them while the data that they depend on are unchanged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import fetch

from flatout.intercept import handled_calls
from flatout.intercept.containment import attempt
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, wrap_function
from flatout.intercept.purity import ImpureError, examine
from flatout.machine import system

BUDGET_SHARE = 0.25
"""The share of the memory that is available at the start which all samples together may use."""

DEFAULT_BUDGET_BYTES = 1 << 30
"""The memory for samples where the system does not say how much is available."""

AddEvent = Callable[[str, str], None]


class SampleCache:
    """Replaces ``_MapDatasetFetcher.fetch``, by which loaders fetch their batches.

    A sample is stored with a digest of the data that it depends on, and reused while the digest is
    the same. Torch fetches from datasets for which these data are not known.

    Args:
        add_event: called with ``"noticed"`` or ``"skipped"`` and a clause for the record.
        on_failure: called with the exception if this fails; torch then fetches the batch.
        budget_bytes: the memory for all samples together; ``None``: ``available_bytes()``.
    """

    def __init__(
        self,
        add_event: AddEvent,
        on_failure: Callable[[Exception], None],
        budget_bytes: int | None = None,
    ) -> None:
        self._add_event = add_event
        self._on_failure = on_failure
        self._budget_bytes = available_bytes() if budget_bytes is None else budget_bytes
        self._stores: WeakIdentityDict[Any, Store] = WeakIdentityDict()

    def install(self) -> Undo:
        """Replace torch's method; returns the undo, which keeps the samples for another time."""
        return wrap_function(fetch._MapDatasetFetcher, "fetch", self._on_failure, self.fetch)

    def fetch(self, original: Callable[[Any, Any], Any], fetcher: Any, index: Any) -> Any:
        """Fetch a batch from the stored samples, or with the fetcher's method ``original``."""
        store = self._store(fetcher.dataset)
        if store is None or type(index) is not list or data.get_worker_info() is not None:
            return original(fetcher, index)
        try:
            digests = self._digests(store, fetcher, index)
        except ImpureError as error:
            self._leave_alone(store, str(error))
            return original(fetcher, index)
        samples = []
        for i, digest in zip(index, digests, strict=True):
            stored = store.samples.get(i)
            if stored is not None and stored[0] == digest:
                samples.append(copy(stored[1]))
                handled_calls.counts["loader"] += 1
            else:
                samples.append(fetcher.dataset[i])
                attempt(self._on_failure, self._keep, store, i, digest, samples[-1])
        return fetcher.collate_fn(samples)

    @property
    def _left_bytes(self) -> int:
        return self._budget_bytes - sum(store.held_bytes for store in self._stores.values())

    def _store(self, dataset: Any) -> Store | None:
        """The store of a dataset; ``None`` if the dataset is left alone."""
        store = self._stores.get(dataset)
        if store is None:
            try:
                store = self._stores.setdefault(dataset, Store(type(dataset).__qualname__))
            except TypeError:
                return None  # it is a list, whose samples are in memory already
        return None if store.is_left_alone else store

    def _digests(self, store: Store, fetcher: Any, indices: Sequence[Any]) -> list[bytes]:
        """Digests of the data that the samples at ``indices`` depend on, as they are now.

        Raises:
            ImpureError: the samples are not known to be functions of their index and of data.
        """
        if not fetcher.auto_collation:
            raise ImpureError("its loader returns single samples instead of batches")
        if not all(type(index) is int for index in indices):
            raise ImpureError("its sampler returns indices that are not integers")
        account = examine(fetcher.dataset, fetcher.collate_fn)
        if account.draws or account.opens:
            raise ImpureError(f"it may {'draw random numbers' if account.draws else 'read files'}")
        seal = account.seal + torch.get_num_threads().to_bytes(4, "little")
        if store.seal != seal:
            if store.seal is None:
                self._add_event("noticed", f"samples of {store.name} are kept in memory")
            self._clear(store)
            store.seal = seal
        return [account.digest((index,)) for index in indices]

    def _keep(self, store: Store, index: int, digest: bytes, sample: Any) -> None:
        if store.is_left_alone:
            return
        if index in store.samples:
            *_, old_size = store.samples.pop(index)
            store.held_bytes -= old_size
        size = size_bytes(sample)
        if size > self._left_bytes:
            if not store.is_full:
                store.is_full = True
                self._add_event(
                    "noticed", f"the memory for samples is full; not all of {store.name} are kept"
                )
            return
        try:
            store.samples[index] = digest, copy(sample), size
        except UnknownTypeError as error:
            self._leave_alone(store, str(error))
            return
        store.held_bytes += size

    def _leave_alone(self, store: Store, why: str) -> None:
        store.is_left_alone = True
        self._clear(store)
        self._add_event("skipped", f"the samples of {store.name} are not kept: {why}")

    def _clear(self, store: Store) -> None:
        store.samples.clear()
        store.held_bytes = 0


class Store:
    """The stored samples of one dataset.

    Args:
        name: the name of the dataset's class.

    Attributes:
        seal: the digest of what all samples depend on; see ``Account``.
        samples: the digest, the sample and its size in bytes, by index.
        held_bytes: the size of all samples.
        is_full: whether there was no memory for a sample.
        is_left_alone: whether the samples of this dataset are not kept.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seal: bytes | None = None
        self.samples: dict[int, tuple[bytes, Any, int]] = {}
        self.held_bytes = 0
        self.is_full = False
        self.is_left_alone = False


class UnknownTypeError(Exception):
    """A sample contains an object of a type that cannot be copied; the message is a clause."""


_IMMUTABLE = (int, float, complex, bool, str, bytes, type(None))


def copy(sample: Any) -> Any:
    """Copy a sample so that the copy shares nothing mutable with it.

    Raises:
        UnknownTypeError: it contains an object of a type that cannot be copied.
    """
    kind = type(sample)
    if kind in _IMMUTABLE:
        return sample
    if kind is torch.Tensor and sample.layout is torch.strided and not sample.requires_grad:
        return sample.clone()
    if kind is dict:
        return {key: copy(value) for key, value in sample.items()}
    if kind in (list, tuple):
        return kind(map(copy, sample))
    if isinstance(sample, tuple) and hasattr(sample, "_fields"):
        return kind(*map(copy, sample))
    numpy = sys.modules.get("numpy")
    if numpy is not None and kind is numpy.ndarray and not sample.dtype.hasobject:
        return sample.copy()
    if numpy is not None and isinstance(sample, numpy.generic):
        return sample
    raise UnknownTypeError(f"they contain a {kind.__qualname__}, which cannot be copied")


def size_bytes(sample: Any) -> int:
    """The approximate size of a sample in memory."""
    if isinstance(sample, dict):
        return sum(map(size_bytes, sample.values())) + sys.getsizeof(sample)
    if isinstance(sample, (list, tuple)):
        return sum(map(size_bytes, sample)) + sys.getsizeof(sample)
    if isinstance(sample, torch.Tensor):
        return sample.nbytes + 256
    return sys.getsizeof(sample)


def available_bytes() -> int:
    """The memory that samples, or decoded images, may use in this process."""
    available = system.available_bytes()
    return DEFAULT_BUDGET_BYTES if available is None else int(available * BUDGET_SHARE)
