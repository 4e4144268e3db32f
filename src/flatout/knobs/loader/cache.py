"""Samples of datasets that turned out to be deterministic, kept in memory."""

from __future__ import annotations

import random
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import fetch
from torch.utils.data._utils.collate import default_collate

from flatout import system
from flatout.agent.place import take_place
from flatout.knobs import Undo

TRUSTED_AFTER = 64
"""Samples that must have come out the same twice before any is taken from memory."""

BUDGET_SHARE = 0.25
"""Of the memory that is available at the start, for all samples together."""

DEFAULT_BUDGET_BYTES = 1 << 30
"""Where the system does not say how much memory is available."""

Say = Callable[[str, str], None]


class SampleCache:
    """Stands in for ``_MapDatasetFetcher.fetch``, through which loaders get their batches.

    What is learned about a dataset is learned from the fetches that the program makes: nothing is
    fetched twice for it. Samples are kept in the first epoch and compared in the next. Once
    ``TRUSTED_AFTER`` of them have come out the same, they are taken from memory, except for one of
    each batch, which is fetched and compared. A dataset that draws random numbers, or whose sample
    differs, is fetched from as ever from that batch on.

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
        self._left_bytes = available_bytes() if budget_bytes is None else budget_bytes
        self._stores: dict[int, Store] = {}
        self._own: Callable[[Any, Any], Any] = fetch._MapDatasetFetcher.fetch

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that.

        What is known stays, in case it is wanted again.
        """
        self._own = fetch._MapDatasetFetcher.fetch
        return take_place(
            fetch._MapDatasetFetcher, "fetch", lambda fetcher, index: self.fetch(fetcher, index)
        )

    def fetch(self, fetcher: Any, index: Any) -> Any:
        """A batch, as the loader's fetcher would make it."""
        store = self._store(fetcher.dataset)
        indices = index if fetcher.auto_collation else [index]
        if (
            store is None
            or data.get_worker_info() is not None
            or type(indices) is not list
            or not all(type(i) is int for i in indices)
        ):
            return self._own(fetcher, index)
        before = random_states()
        if store.is_trusted:
            samples = self._from_memory(store, fetcher, indices)
            if samples is not None and random_states() == before:
                return fetcher.collate_fn(samples if fetcher.auto_collation else samples[0])
            set_random_states(before)
            if store.is_trusted:
                self._leave(store, "it has begun to return other samples than before")
            return self._own(fetcher, index)
        samples = fetched(fetcher, indices)
        self._learn(store, indices, samples, random_states() == before)
        return fetcher.collate_fn(samples if fetcher.auto_collation else samples[0])

    def _store(self, dataset: Any) -> Store | None:
        """What is known of a dataset; nothing when it is left alone."""
        identity = id(dataset)
        store = self._stores.get(identity)
        if store is None:
            try:
                reference = weakref.ref(dataset, lambda _: self._forget(identity))
            except TypeError:
                return None  # a list of what is in memory already
            store = self._stores[identity] = Store(type(dataset).__qualname__, reference)
        return None if store.is_left else store

    def _forget(self, identity: int) -> None:
        store = self._stores.pop(identity, None)
        if store is not None:
            self._left_bytes += store.held_bytes

    def _leave(self, store: Store, why: str) -> None:
        store.is_left = True
        store.is_trusted = False
        store.samples.clear()
        self._left_bytes += store.held_bytes
        store.held_bytes = 0
        self._say("skipped", f"the samples of {store.name} are not kept: {why}")

    def _learn(
        self, store: Store, indices: Sequence[int], samples: Sequence[Any], is_calm: bool
    ) -> None:
        """Keep or compare samples that were fetched; ``is_calm``: without random numbers."""
        try:
            if not is_calm:
                self._leave(store, "it draws random numbers")
                return
            for index, sample in zip(indices, samples, strict=True):
                kept = store.samples.get(index, _NOTHING)
                if kept is _NOTHING:
                    self._keep(store, index, sample)
                elif same(kept, sample):
                    store.compared += 1
                else:
                    self._leave(store, "the same index gave another sample")
                    return
        except UnknownTypeError as error:
            self._leave(store, str(error))
        except Exception as error:  # noqa: BLE001 - reported
            self._on_failure(error)
        if store.compared >= TRUSTED_AFTER and not store.is_trusted and not store.is_left:
            store.is_trusted = True
            self._say("noticed", f"samples of {store.name} come from memory from now on")

    def _keep(self, store: Store, index: int, sample: Any) -> None:
        if self._left_bytes <= 0:
            return
        store.samples[index] = copied(sample)
        held = size_bytes(store.samples[index])
        store.held_bytes += held
        self._left_bytes -= held
        if self._left_bytes <= 0:
            self._say("noticed", f"memory for samples is used up by those of {store.name}")

    def _from_memory(self, store: Store, fetcher: Any, indices: Sequence[int]) -> list[Any] | None:
        """Samples from memory, and one of them from the dataset to compare; nothing if it differs.

        Those not in memory are fetched and kept.
        """
        probe = indices[store.probes % len(indices)] if indices else None
        store.probes += 1
        real = [i for i in indices if i not in store.samples]
        if probe in store.samples:
            real.append(probe)
        found = dict(zip(real, fetched(fetcher, real), strict=True)) if real else {}
        is_shared = fetcher.collate_fn is not default_collate
        try:
            if probe in store.samples and not same(store.samples[probe], found[probe]):
                return None
            for index, sample in found.items():
                if index not in store.samples:
                    self._keep(store, index, sample)
            return [
                found[i]
                if i in found
                else copied(store.samples[i])
                if is_shared
                else store.samples[i]
                for i in indices
            ]
        except UnknownTypeError as error:
            self._leave(store, str(error))
        except Exception as error:  # noqa: BLE001 - reported
            self._on_failure(error)
            store.is_left = True
            store.is_trusted = False
        return None


class Store:
    """What is known of one dataset.

    Args:
        name: of its class.
        reference: whose callback forgets this.

    Attributes:
        samples: by index.
        held_bytes: their size.
        compared: how many have come out the same twice.
        probes: how many batches were checked.
        is_trusted: whether samples are taken from here.
        is_left: whether the dataset is left alone.
    """

    def __init__(self, name: str, reference: weakref.ref[Any]) -> None:
        self.name = name
        self.reference = reference
        self.samples: dict[int, Any] = {}
        self.held_bytes = 0
        self.compared = 0
        self.probes = 0
        self.is_trusted = False
        self.is_left = False


_NOTHING = object()


class UnknownTypeError(Exception):
    """A sample holds what cannot be copied and compared; one sentence."""


def fetched(fetcher: Any, indices: Sequence[int]) -> list[Any]:
    """Samples as torch's fetcher gets them from the dataset."""
    dataset = fetcher.dataset
    many = getattr(dataset, "__getitems__", None) if fetcher.auto_collation else None
    if many:
        samples: list[Any] = many(indices)
        return samples
    return [dataset[index] for index in indices]


def random_states() -> tuple[Any, ...]:
    """Of the generators that datasets draw from without asking for one of their own."""
    numpy = sys.modules.get("numpy")
    of_numpy: tuple[Any, ...] = ()
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        of_numpy = (name, keys.tobytes(), *rest)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), of_numpy


def set_random_states(states: tuple[Any, ...]) -> None:
    """Set what ``random_states`` returned."""
    of_torch, of_python, of_numpy = states
    torch.set_rng_state(torch.frombuffer(bytearray(of_torch), dtype=torch.uint8))
    random.setstate(of_python)
    if of_numpy:
        import numpy

        name, keys, *rest = of_numpy
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))


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
    raise UnknownTypeError(f"they hold a {kind.__qualname__}, which cannot be compared")


def same(kept: Any, sample: Any) -> bool:
    """Whether two samples are equal to the last bit."""
    kind = type(kept)
    if type(sample) is not kind:
        return False
    if kind is torch.Tensor:
        return (
            kept.dtype == sample.dtype
            and kept.shape == sample.shape
            and kept.device == sample.device
            and torch.equal(_bytes(kept), _bytes(sample))
        )
    if kind is dict:
        return list(kept) == list(sample) and all(same(kept[key], sample[key]) for key in kept)
    if isinstance(kept, (list, tuple)):
        return len(kept) == len(sample) and all(map(same, kept, sample))
    if hasattr(kept, "tobytes"):
        return (
            kept.dtype == sample.dtype
            and kept.shape == sample.shape
            and bool(kept.tobytes() == sample.tobytes())
        )
    return bool(kept == sample) or (kept != kept and sample != sample)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


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
