"""Tensors as kernels see them: addresses and numbers of elements."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose elements are where ``data_ptr`` says; a subclass may keep them anywhere."""

_KINDS = frozenset({(torch.float32, True, torch.strided)})
_kind = operator.attrgetter("dtype", "is_cpu", "layout")


def are_floats(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are contiguous and of float32 on the CPU."""
    return (
        PLAIN.issuperset(map(type, tensors))
        and _KINDS.issuperset(map(_kind, tensors))
        and all(map(torch.Tensor.is_contiguous, tensors))
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it is of float32 on the CPU, and its elements are all that lies between its first and
    its last."""
    return (
        type(tensor) in PLAIN
        and _kind(tensor) in _KINDS
        and (
            tensor.is_contiguous()
            or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))
        )
    )


def call(
    kernel: Callable[..., Any], tensors: Sequence[torch.Tensor], serial_below: int, *rest: Any
) -> Any:
    """What a kernel returns that is given tensors.

    Args:
        kernel: gets an array of addresses, one of numbers of elements, how many there are, for how
            many threads, and the rest.
        tensors: dense ones.
        serial_below: elements below which one thread does it: waking the others takes as long.
    """
    addresses = array("Q", map(torch.Tensor.data_ptr, tensors))
    sizes = array("q", map(torch.Tensor.numel, tensors))
    threads = torch.get_num_threads() if sum(sizes) >= serial_below else 1
    return kernel(
        *(addresses.buffer_info()[0], sizes.buffer_info()[0], len(addresses), threads, *rest)
    )
