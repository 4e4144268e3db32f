"""Fetch whole batches by one index operation for each array instead of sample by sample."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import fetch
from torch.utils.data._utils.collate import default_collate

from flatout.intercept import handled_calls
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo, wrap_function
from flatout.intercept.purity import is_torchs_own
from flatout.knobs.loader import recipe
from flatout.knobs.loader.recipe import CASTS, INDEX, Group, Made, Number, Recipe, Row
from flatout.knobs.loader.rows import Rows

CHECKED_BATCHES = 2
"""So many batches of a dataset that the program has written are fetched in both ways and compared,
before the samples are no longer fetched one by one."""

_FLOATS = (torch.float32, torch.float64)
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_DTYPES = (*_FLOATS, *_INTEGERS)
"""The data types of which whole batches are cast as single samples are."""


def can_be_batched(dataset: Any, collate_fn: Any) -> bool:
    """Whether the samples of a dataset are rows of arrays, which torch itself collates."""
    if collate_fn is not default_collate or not is_torchs_own():
        return False
    return _is_made_of_rows(dataset)


def _is_made_of_rows(dataset: Any) -> bool:
    kind = type(dataset)
    if "__getitems__" in vars(dataset):
        return False
    if kind is data.Subset:
        return _is_made_of_rows(dataset.dataset)
    if kind is data.ConcatDataset:
        return all(map(_is_made_of_rows, dataset.datasets))
    if hasattr(dataset, "__getitems__"):
        return False
    if kind is data.TensorDataset:
        return True
    known = _read_recipe(dataset)
    return known is not None and all(_is_source(vars(dataset)[name]) for name in known.rows)


def _read_recipe(dataset: Any) -> Recipe | None:
    is_plain = isinstance(dataset, data.Dataset) and not isinstance(dataset, data.IterableDataset)
    return recipe.read(dataset) if is_plain else None


class _NotBatchedError(Exception):
    """A batch must be fetched sample by sample."""


class BatchedFetch:
    """Replaces ``_MapDatasetFetcher.fetch``, by which loaders fetch their batches.

    It handles ``TensorDataset``, datasets of the program that have a recipe (``recipe.py``), and
    subsets and concatenations of them, with torch's ``default_collate``: rows that are stacked are
    the same as one ``index_select``. Torch fetches all other datasets.

    Args:
        on_failure: called with the exception if this fails; torch then fetches the batch.
        library: compiled from ``kernels/rows.c``, or ``None``.
    """

    def __init__(
        self, on_failure: Callable[[Exception], None], library: ctypes.CDLL | None = None
    ) -> None:
        self._on_failure = on_failure
        self._rows = Rows(library)
        self._recipes: WeakIdentityDict[Any, Recipe] = WeakIdentityDict()
        self._checked: WeakIdentityDict[Any, int] = WeakIdentityDict()

    def install(self) -> Undo:
        """Replace torch's method; returns the undo."""
        return wrap_function(fetch._MapDatasetFetcher, "fetch", self._on_failure, self.fetch)

    def fetch(self, original: Callable[[Any, Any], Any], fetcher: Any, index: Any) -> Any:
        """Fetch a batch at once, or with the fetcher's method ``original``."""
        dataset = fetcher.dataset
        if (
            not fetcher.auto_collation
            or fetcher.collate_fn is not default_collate
            or not is_torchs_own()
            or data.get_worker_info() is not None  # in a worker, torch collates into shared memory
            or torch._C._len_torch_function_stack()  # a mode of the program observes each operator
            or torch._C._len_torch_dispatch_stack()
        ):
            return original(fetcher, index)
        followed: list[Any] = []
        try:
            batch = self._collate(dataset, index, followed)
        except _NotBatchedError:
            return original(fetcher, index)
        handled_calls.counts["loader"] += 1
        unchecked = [one for one in followed if self._checked[one] < CHECKED_BATCHES]
        if unchecked:
            expected = original(fetcher, index)
            assert _are_equal(batch, expected), f"{type(dataset).__name__} makes other batches"
            for one in unchecked:
                self._checked[one] += 1
            return expected
        return batch

    def _collate(self, dataset: Any, indices: Any, followed: list[Any]) -> Any:
        """Return the collated samples of a dataset.

        Args:
            dataset: the dataset.
            indices: the indices of the samples, for which anything may stand.
            followed: gets the datasets whose recipes were followed.

        Raises:
            _NotBatchedError: they must be fetched one by one.
        """
        kind = type(dataset)
        if "__getitems__" in vars(dataset):
            raise _NotBatchedError
        if kind is data.Subset:
            return self._collate(dataset.dataset, _select(dataset.indices, indices), followed)
        if kind is data.ConcatDataset:
            return self._collate_parts(dataset, indices, followed)
        if hasattr(dataset, "__getitems__"):
            raise _NotBatchedError
        if kind is data.TensorDataset:
            return self._select_rows(dataset.tensors, indices)
        batch = self._follow_recipe(dataset, indices)
        followed.append(dataset)
        return batch

    def _select_rows(self, tensors: Any, indices: Any) -> list[torch.Tensor]:
        if type(tensors) is not tuple or not tensors or not all(map(_is_plain, tensors)):
            raise _NotBatchedError
        _demand_integers(indices)
        batch = self._rows.take(tensors, indices)
        if batch is None:
            raise _NotBatchedError
        return batch

    def _collate_parts(self, dataset: Any, indices: Any, followed: list[Any]) -> Any:
        """Return the collated samples of a concatenation of datasets."""
        ends = dataset.cumulative_sizes
        if type(ends) is not list or not ends:
            raise _NotBatchedError
        _demand_within(indices, ends[-1])
        of_parts: dict[int, tuple[list[int], list[int]]] = {}
        for place, index in enumerate(indices):
            part = bisect.bisect_right(ends, index)
            places, inside = of_parts.setdefault(part, ([], []))
            places.append(place)
            inside.append(index - (ends[part - 1] if part else 0))
        batches = [
            self._collate(dataset.datasets[part], inside, followed)
            for part, (_, inside) in of_parts.items()
        ]
        if len(batches) == 1:
            return batches[0]
        places = [place for own, _ in of_parts.values() for place in own]
        order = torch.empty(len(places), dtype=torch.int64, device="cpu")
        order[torch.tensor(places, device="cpu")] = torch.arange(len(places), device="cpu")
        return _interleave(batches, order)

    def _follow_recipe(self, dataset: Any, indices: Any) -> Any:
        """Return the collated samples of a dataset of the program."""
        attributes = getattr(dataset, "__dict__", {})
        known = self._recipes.get(dataset)
        if known is None or not known.holds(dataset, attributes, type(dataset).__getitem__):
            known = _read_recipe(dataset)
            if known is None:
                raise _NotBatchedError
            self._recipes[dataset] = known
            self._checked[dataset] = 0
        _demand_integers(indices)
        try:
            return _collate_part(known.sample, attributes, indices)
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise _NotBatchedError from error  # torch raises it where the program expects it


def _select(subset_indices: Any, indices: Any) -> list[int]:
    """Convert indices of a subset to indices of the dataset that it is a subset of."""
    if type(subset_indices) is not list:
        raise _NotBatchedError
    _demand_within(indices, len(subset_indices))
    return [subset_indices[index] for index in indices]


def _demand_within(indices: Any, length: int) -> None:
    """Demand a list of integers from 0 to ``length - 1`` that is not empty."""
    _demand_integers(indices)
    if min(indices) < 0 or max(indices) >= length:
        raise _NotBatchedError


def _demand_integers(indices: Any) -> None:
    """Demand a list of integers that is not empty."""
    if type(indices) is not list or set(map(type, indices)) != {int}:
        raise _NotBatchedError


def _is_plain(tensor: Any) -> bool:
    """Whether stacking rows of a tensor gives the same as its ``index_select``."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.dim() > 0
        and not (tensor.requires_grad or tensor.is_quantized or any(getattr(tensor, "names", ())))
    )


# Recipes


def _collate_part(
    part: Any, attributes: Mapping[str, Any], indices: list[int], collect: type = list
) -> Any:
    """Return the collated values of a part of the samples.

    Args:
        part: the part.
        attributes: the attributes of the dataset.
        indices: the indices of the samples.
        collect: the type of the sequence in which torch collects the values of this part.
    """
    if isinstance(part, Group):
        inner = list if part.kind is dict else tuple
        values = [_collate_part(one, attributes, indices, inner) for one in part.parts]
        return dict(zip(part.keys, values, strict=True)) if part.kind is dict else values
    if part == INDEX:
        return default_collate(collect(indices))
    assert isinstance(part, Row)
    source = attributes[part.attribute]
    wanted = torch.tensor(indices, device="cpu")
    first = _evaluate(part.first, attributes, wanted)
    count = None
    if part.end is not None:
        lengths = _evaluate(part.end, attributes, wanted) - first
        count = int(lengths[0])
        if count < 0 or bool((lengths != count).any()):
            raise _NotBatchedError
    last = int(first.max()) + (0 if count is None else count - 1)
    if not _is_source(source) or int(first.min()) < 0 or last >= len(source):
        raise _NotBatchedError
    if type(source) in (list, tuple):
        return default_collate(collect(_take_each(source, part, first, count)))
    return _take(source, part.made, first, count)


def _evaluate(number: Number, attributes: Mapping[str, Any], index: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = number.evaluate(attributes, index)
    return value


def _take(
    source: Any, made: Sequence[Made], first: torch.Tensor, count: int | None
) -> torch.Tensor:
    """Return rows of an array, stacked.

    Args:
        source: the array.
        made: the calls that each row goes through.
        first: the number of each row.
        count: how many rows from this one on belong to each sample; ``None``: one, without a
            dimension of its own.

    Raises:
        _NotBatchedError: they must be taken one by one.
    """
    is_array = _is_array(source)
    if not (is_array or _is_plain(source)):
        raise _NotBatchedError
    wanted = first
    if count is not None:
        wanted = (first[:, None] + torch.arange(count, device="cpu")).reshape(-1)
    if is_array:
        # Results of kernels may depend on the alignment of memory, so it must be torch's.
        dtype = torch.from_numpy(source[:0]).dtype
        batch = torch.empty((len(wanted), *source.shape[1:]), dtype=dtype, device="cpu")
        source.take(wanted.numpy(), axis=0, out=batch.numpy(), mode="clip")
    else:
        batch = source.index_select(0, wanted)
    if count is not None:
        batch = batch.reshape(len(first), count, *batch.shape[1:])
    return _make(batch, made, is_array, is_scalar=is_array and source.ndim == 1 and count is None)


def _make(
    batch: torch.Tensor, made: Sequence[Made], is_array: bool, is_scalar: bool
) -> torch.Tensor:
    """Make of stacked rows what some calls make of each row.

    Raises:
        _NotBatchedError: that is not known.
    """
    for one in made:
        if one.name in CASTS:
            if is_array:
                raise _NotBatchedError
            dtype = CASTS[one.name]
        elif not is_array or (one.name == "from_numpy" and is_scalar):
            raise _NotBatchedError  # torch warns, or refuses
        else:
            dtype, is_array = one.dtype or batch.dtype, False
        is_known = dtype in _DTYPES and batch.dtype in _DTYPES
        if not is_known or (batch.dtype in _FLOATS and dtype not in _FLOATS):
            raise _NotBatchedError
        batch = batch.to(dtype)
    return batch


def _is_source(source: Any) -> bool:
    """Whether taking a row of something has no side effects."""
    kind = type(source)
    is_array = kind.__module__ == "numpy" and kind.__name__ in ("ndarray", "memmap")
    return kind in (list, tuple, torch.Tensor) or is_array


def _is_array(source: Any) -> bool:
    """Whether rows of an array of NumPy become tensors as the whole array does, without a
    warning."""
    kind = type(source)
    if kind.__module__ != "numpy" or kind.__name__ != "ndarray" or source.ndim == 0:
        return False
    dtype = source.dtype
    return (
        dtype.name in {str(one).removeprefix("torch.") for one in _DTYPES}
        and dtype.isnative
        and source.flags.writeable
        and all(stride >= 0 for stride in source.strides)
    )


def _take_each(source: Any, row: Row, first: torch.Tensor, count: int | None) -> list[Any]:
    """Take rows of a list as the program does, one by one.

    Raises:
        _NotBatchedError: a row is of a kind with which torch may do anything.
    """
    samples = []
    for place in first.tolist():
        value = source[place] if count is None else source[place : place + count]
        kinds = (int, float, bool) if row.made else (int, float, bool, str, torch.Tensor)
        if type(value) not in kinds:
            raise _NotBatchedError
        for one in row.made:
            named = {} if one.dtype is None else {"dtype": one.dtype}
            made = getattr(torch, one.name) if one.name not in CASTS else None
            value = getattr(value, one.name)() if made is None else made(value, **named)
        samples.append(value)
    return samples


# Batches


def _interleave(batches: Sequence[Any], order: torch.Tensor) -> Any:
    """Join batches of the same structure, and put the samples into an order."""
    one = batches[0]
    if any(type(other) is not type(one) for other in batches):
        raise _NotBatchedError
    if isinstance(one, torch.Tensor):
        kinds = {(batch.dtype, batch.shape[1:]) for batch in batches}
        if len(kinds) > 1 or not all(map(_is_plain, batches)):
            raise _NotBatchedError
        return torch.cat(list(batches)).index_select(0, order)
    if type(one) is dict and all(batch.keys() == one.keys() for batch in batches):
        return {key: _interleave([batch[key] for batch in batches], order) for key in one}
    if type(one) is list and len({len(batch) for batch in batches}) == 1:
        return [_interleave(parts, order) for parts in zip(*batches, strict=True)]
    raise _NotBatchedError


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two batches are the same, bit by bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if (one.dtype, one.shape, one.stride()) != (other.dtype, other.shape, other.stride()):
            return False
        return torch.equal(_bytes(one), _bytes(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_are_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    return bool(one == other)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
