"""Whole batches of tensors by one index operation each, not sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import fetch
from torch.utils.data._utils.collate import default_collate

from flatout.intercept import engagement
from flatout.intercept.patch import Undo, wrap_function
from flatout.knobs.loader.purity import is_torchs_own


def is_of_tensors(dataset: Any, collate_fn: Any) -> bool:
    """Whether samples are rows of tensors, got and put together as torch does it."""
    while type(dataset) is data.Subset and "__getitems__" not in vars(dataset):
        dataset = dataset.dataset
    return (
        collate_fn is default_collate
        and type(dataset) is data.TensorDataset
        and not hasattr(dataset, "__getitems__")
        and is_torchs_own()
    )


class BatchedFetch:
    """Stands in for ``_MapDatasetFetcher.fetch``, through which loaders get their batches.

    It knows ``TensorDataset`` and subsets of it, put together by torch's own ``default_collate``:
    rows of a tensor, stacked, are ``index_select`` of it. All else is fetched as ever.

    Args:
        on_failure: called when something here failed; the batch is fetched as ever.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that."""
        return wrap_function(fetch._MapDatasetFetcher, "fetch", self._on_failure, self.fetch)

    def fetch(self, own: Callable[[Any, Any], Any], fetcher: Any, index: Any) -> Any:
        """A batch, as the loader's fetcher would make it by its method ``own``."""
        batch = None
        if fetcher.auto_collation and is_of_tensors(fetcher.dataset, fetcher.collate_fn):
            batch = rows(fetcher.dataset, index)
        if batch is None:
            return own(fetcher, index)
        engagement.calls["loader"] += 1
        return batch


def rows(dataset: Any, indices: Any) -> list[torch.Tensor] | None:
    """The samples at ``indices`` put together; ``None``: sample by sample, it must be."""
    if data.get_worker_info() is not None:
        return None  # there, torch puts samples together in memory that it can share
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return None  # a mode of the program looks at each operation
    while type(dataset) is data.Subset:
        indices = _chosen(dataset.indices, indices)
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


def _chosen(of: Any, indices: Any) -> list[int] | None:
    """What a subset's indices are in the set that it chooses from."""
    if type(of) is not list or not _are_within(indices, len(of)):
        return None
    return [of[index] for index in indices]


def _are_within(indices: Any, length: int) -> bool:
    """Whether these are indices of samples that exist, counted from the front."""
    return (
        type(indices) is list
        and bool(indices)
        and all(type(index) is int for index in indices)
        and min(indices) >= 0
        and max(indices) < length
    )


def _is_plain(tensor: Any) -> bool:
    """Whether rows of a tensor, stacked, are the same as its ``index_select``."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and tensor.dim() > 0
        and not (tensor.requires_grad or tensor.is_quantized or any(getattr(tensor, "names", ())))
    )
