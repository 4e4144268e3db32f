"""Fetch whole batches of tensors by one index operation per tensor instead of sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import fetch
from torch.utils.data._utils.collate import default_collate

from flatout.intercept import handled_calls
from flatout.intercept.patch import Undo, wrap_function
from flatout.intercept.purity import is_torchs_own


def is_of_tensors(dataset: Any, collate_fn: Any) -> bool:
    """Whether samples are rows of tensors that torch itself fetches and collates."""
    while type(dataset) is data.Subset and "__getitems__" not in vars(dataset):
        dataset = dataset.dataset
    return (
        collate_fn is default_collate
        and type(dataset) is data.TensorDataset
        and not hasattr(dataset, "__getitems__")
        and is_torchs_own()
    )


class BatchedFetch:
    """Replaces ``_MapDatasetFetcher.fetch``, by which loaders fetch their batches.

    It handles ``TensorDataset`` and subsets of it with torch's ``default_collate``: rows of a
    tensor that are stacked are the same as one ``index_select``. Torch fetches all other datasets.

    Args:
        on_failure: called with the exception if this fails; torch then fetches the batch.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure

    def install(self) -> Undo:
        """Replace torch's method; returns the undo."""
        return wrap_function(fetch._MapDatasetFetcher, "fetch", self._on_failure, self.fetch)

    def fetch(self, original: Callable[[Any, Any], Any], fetcher: Any, index: Any) -> Any:
        """Fetch a batch at once, or with the fetcher's method ``original``."""
        batch = None
        if fetcher.auto_collation and is_of_tensors(fetcher.dataset, fetcher.collate_fn):
            batch = select_rows(fetcher.dataset, index)
        if batch is None:
            return original(fetcher, index)
        handled_calls.counts["loader"] += 1
        return batch


def select_rows(dataset: Any, indices: Any) -> list[torch.Tensor] | None:
    """The collated samples at ``indices``; ``None`` if they must be fetched one by one."""
    if data.get_worker_info() is not None:
        return None  # in a worker, torch collates into shared memory
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return None  # a mode of the program observes each operator
    while type(dataset) is data.Subset:
        indices = _select(dataset.indices, indices)
        if indices is None:
            return None
        dataset = dataset.dataset
    if type(dataset.tensors) is not tuple or not all(map(_is_plain, dataset.tensors)):
        return None
    length = min(len(tensor) for tensor in dataset.tensors)
    if not _are_within(indices, length):
        return None
    wanted = torch.tensor(indices, device="cpu")
    return [tensor.index_select(0, wanted) for tensor in dataset.tensors]


def _select(subset_indices: Any, indices: Any) -> list[int] | None:
    """Convert indices of a subset to indices of the dataset that it is a subset of."""
    if type(subset_indices) is not list or not _are_within(indices, len(subset_indices)):
        return None
    return [subset_indices[index] for index in indices]


def _are_within(indices: Any, length: int) -> bool:
    """Whether this is a list of integers from 0 to ``length - 1`` that is not empty."""
    return (
        type(indices) is list
        and bool(indices)
        and all(type(index) is int for index in indices)
        and min(indices) >= 0
        and max(indices) < length
    )


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
