"""Passing tensors to compiled kernels: conditions on their memory, and their addresses."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose elements are stored at ``data_ptr``; a subclass may store them elsewhere."""

_SUPPORTED = frozenset({(torch.float32, True, torch.strided)})
_dtype_device_layout = operator.attrgetter("dtype", "is_cpu", "layout")


def are_contiguous_float32(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors are contiguous, of float32, on the CPU, and plain memory."""
    return _are_plain_memory(tensors) and all(map(torch.Tensor.is_contiguous, tensors))


def is_dense_float32(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense (without gaps or overlaps, in any order of dimensions), of float32,
    on the CPU, and plain memory."""
    return _are_plain_memory((tensor,)) and (
        tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))
    )


def _are_plain_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether the memory of all tensors holds their elements, and a kernel may write it.

    The memory of a tensor with the lazy negative bit (``z.conj().imag``) holds the negated
    elements. An inference tensor has no version counter that could be incremented after a write.
    """
    return (
        PLAIN.issuperset(map(type, tensors))
        and _SUPPORTED.issuperset(map(_dtype_device_layout, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_inference, tensors))
    )


def share_no_memory(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor] = ()) -> bool:
    """Whether no two tensors overlap, except tensors of ``read`` that begin at the same address.

    Args:
        written: dense tensors of float32.
        read: dense tensors of float32 that are only read; they may be the same memory, as the
            gradients of a sum are.
    """
    end_of = dict(sorted(_spans(read)))  # the longest of those at one address
    apart = len(end_of)
    for start, end in _spans(written):
        end_of[start] = end
        apart += 1
    ordered = sorted(end_of)
    ends = map(end_of.__getitem__, ordered)
    return len(end_of) == apart and all(map(operator.le, ends, ordered[1:]))


def _spans(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Yield the first address and the address after the end of each tensor that is not empty."""
    starts = map(torch.Tensor.data_ptr, tensors)
    for start, size in zip(starts, map(torch.Tensor.numel, tensors), strict=True):
        if size:
            yield start, start + 4 * size


def find_rows_sharing_memory(
    rows: Sequence[Sequence[torch.Tensor]], is_written: Sequence[bool]
) -> list[bool]:
    """Find the rows in which a tensor overlaps another one, of any row, of which one is written.

    Args:
        rows: dense tensors of float32; all rows have the same length.
        is_written: for each position in a row, whether the tensor there is written.

    Returns:
        For each row, whether it is one of them.
    """
    spans = sorted(
        (start := tensor.data_ptr(), start + 4 * tensor.numel(), index, written)
        for index, row in enumerate(rows)
        for tensor, written in zip(row, is_written, strict=True)
        if tensor.numel()
    )
    found = [False] * len(rows)
    # End and row of the earlier spans that may still overlap the current one.
    open_written: list[tuple[int, int]] = []
    open_read: list[tuple[int, int]] = []
    for start, end, index, written in spans:
        open_written = [other for other in open_written if other[0] > start]
        overlapping = list(open_written)
        if written:  # checked only then, because many that are read may begin at one address
            open_read = [other for other in open_read if other[0] > start]
            overlapping += open_read
        for _, other_index in overlapping:
            found[index] = found[other_index] = True
        (open_written if written else open_read).append((end, index))
    return found


def call_kernel(
    kernel: Callable[..., Any], tensors: Sequence[torch.Tensor], serial_below: int, *rest: Any
) -> Any:
    """Call a kernel with the addresses of tensors, and return its result.

    Args:
        kernel: called with an array of addresses, an array of numbers of elements, the length of
            both, the number of threads to use, and ``rest``.
        tensors: dense tensors.
        serial_below: total number of elements below which one thread is used, because waking the
            others would take as long.
        rest: further arguments of the kernel.
    """
    addresses = array("Q", map(torch.Tensor.data_ptr, tensors))
    sizes = array("q", map(torch.Tensor.numel, tensors))
    threads = torch.get_num_threads() if sum(sizes) >= serial_below else 1
    return kernel(
        *(addresses.buffer_info()[0], sizes.buffer_info()[0], len(addresses), threads, *rest)
    )
