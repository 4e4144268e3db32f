"""Whole batches of tensors by one index operation each, not sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import data
from torch.utils.data._utils import collate, fetch
from torch.utils.data._utils.collate import default_collate

from flatout.agent.facts import source
from flatout.agent.place import take_place
from flatout.knobs import Undo

_METHODS = (
    (data.TensorDataset, "__getitem__", data.TensorDataset.__getitem__),
    (data.Subset, "__getitem__", data.Subset.__getitem__),
    (data.Subset, "__getitems__", data.Subset.__getitems__),
)
_COLLATE_TENSORS = collate.default_collate_fn_map[torch.Tensor]


def _is_torchs_own() -> bool:
    """Whether samples are got and put together as torch does it."""
    return collate.default_collate_fn_map.get(torch.Tensor) is _COLLATE_TENSORS and all(
        getattr(kind, name) is method for kind, name, method in _METHODS
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
        self._own: Callable[[Any, Any], Any] = fetch._MapDatasetFetcher.fetch

    def install(self) -> Undo:
        """Take the place of torch's method; returns what ends that."""
        self._own = fetch._MapDatasetFetcher.fetch
        return take_place(
            fetch._MapDatasetFetcher, "fetch", lambda fetcher, index: self.fetch(fetcher, index)
        )

    def fetch(self, fetcher: Any, index: Any) -> Any:
        """A batch, as the loader's fetcher would make it."""
        batch = None
        try:
            if fetcher.auto_collation and fetcher.collate_fn is default_collate:
                batch = rows(fetcher.dataset, index)
        except Exception as error:  # noqa: BLE001 - reported
            self._on_failure(error)
        return self._own(fetcher, index) if batch is None else batch


def rows(dataset: Any, indices: Any) -> list[torch.Tensor] | None:
    """The samples at ``indices`` put together; ``None``: sample by sample, it must be."""
    if (
        type(source(dataset)) is not data.TensorDataset
        or data.get_worker_info() is not None
        or not _is_torchs_own()
    ):
        return None  # in a worker, torch puts samples together in memory that it can share
    while type(dataset) is data.Subset:
        indices = _chosen(dataset.indices, indices)
        if indices is None:
            return None
        dataset = dataset.dataset
    if hasattr(dataset, "__getitems__") or not all(map(_is_plain, dataset.tensors)):
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
        and not tensor.requires_grad
    )
