"""Passing tensors to compiled kernels: conditions on their memory, and their addresses."""

from __future__ import annotations

import functools
import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

EXACT_TENSOR_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
"""The types that store their elements at ``data_ptr``. A subclass may store them elsewhere."""

_SUPPORTED = frozenset({(torch.float32, True, torch.strided)})
_dtype_device_layout = operator.attrgetter("dtype", "is_cpu", "layout")


def are_contiguous_float32(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all tensors are contiguous, of float32, on the CPU, and addressable by a kernel."""
    return _are_kernel_addressable(tensors) and all(map(torch.Tensor.is_contiguous, tensors))


def is_dense_float32(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense (without gaps or overlaps, in any order of dimensions), of float32,
    on the CPU, and addressable by a kernel."""
    return _are_kernel_addressable((tensor,)) and (
        tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))
    )


def _are_kernel_addressable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel may read and write the elements of all tensors at their addresses.

    The memory of a tensor with the lazy negative bit (``z.conj().imag``) holds the negated
    elements. An inference tensor has no version counter that could be incremented after a write.
    """
    return (
        EXACT_TENSOR_TYPES.issuperset(map(type, tensors))
        and _SUPPORTED.issuperset(map(_dtype_device_layout, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_inference, tensors))
    )


def share_no_memory(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor] = ()) -> bool:
    """Whether no two tensors overlap, except tensors of ``read`` that begin at the same address.

    Args:
        written: dense tensors of float32.
        read: dense tensors of float32 that are only read. They may share memory: both inputs of an
            addition can receive the same gradient tensor.
    """
    return _are_disjoint(*_starts_and_sizes(written), *_starts_and_sizes(read))


_Numbers = tuple[int, ...]


def _starts_and_sizes(tensors: Sequence[torch.Tensor]) -> tuple[_Numbers, _Numbers]:
    """Return the addresses of the tensors and their numbers of elements."""
    return tuple(map(torch.Tensor.data_ptr, tensors)), tuple(map(torch.Tensor.numel, tensors))


@functools.lru_cache(maxsize=8)  # the tensors of an optimizer mostly lie where they lay before
def _are_disjoint(
    written_starts: _Numbers, written_sizes: _Numbers, read_starts: _Numbers, read_sizes: _Numbers
) -> bool:
    end_of = dict(sorted(_spans(read_starts, read_sizes)))  # for each start, the largest end
    distinct_count = len(end_of)
    for start, end in _spans(written_starts, written_sizes):
        end_of[start] = end
        distinct_count += 1
    ordered = sorted(end_of)
    ends = map(end_of.__getitem__, ordered)
    return len(end_of) == distinct_count and all(map(operator.le, ends, ordered[1:]))


def _spans(starts: _Numbers, sizes: _Numbers) -> Iterator[tuple[int, int]]:
    """Yield the first address and the address after the end of each tensor that is not empty."""
    for start, size in zip(starts, sizes, strict=True):
        if size:
            yield start, start + 4 * size


def find_rows_sharing_memory(
    rows: Sequence[Sequence[torch.Tensor]], is_written: Sequence[bool]
) -> list[bool]:
    """Find the rows that contain a tensor overlapping some other tensor (in any row), if at least
    one of the two is written.

    Args:
        rows: dense tensors of float32. Each row holds the tensors of one parameter; all rows have
            the same length.
        is_written: for each position in a row, whether the tensor at that position is written.

    Returns:
        For each row, whether it contains such a tensor.
    """
    spans = sorted(
        (start := tensor.data_ptr(), start + 4 * tensor.numel(), index, written)
        for index, row in enumerate(rows)
        for tensor, written in zip(row, is_written, strict=True)
        if tensor.numel()
    )
    found = [False] * len(rows)
    # The ends and the rows of the earlier spans that may overlap the current one. Two tensors that
    # are only read may overlap, so a read is checked only against writes; this also avoids
    # quadratic time when many reads share one address.
    open_written: list[tuple[int, int]] = []
    open_read: list[tuple[int, int]] = []
    for start, end, index, written in spans:
        open_written = [other for other in open_written if other[0] > start]
        overlapping = list(open_written)
        if written:
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
        kernel: called with an array of addresses, an array of element counts, the length of both
            arrays, the number of threads to use, and ``rest``.
        tensors: dense tensors.
        serial_below: the total number of elements below which one thread is used, because waking
            the other threads would take as long as the work.
        rest: further arguments of the kernel.
    """
    addresses = array("Q", map(torch.Tensor.data_ptr, tensors))
    sizes = array("q", map(torch.Tensor.numel, tensors))
    threads = torch.get_num_threads() if sum(sizes) >= serial_below else 1
    address_of_addresses, count = addresses.buffer_info()
    address_of_sizes, _ = sizes.buffer_info()
    return kernel(address_of_addresses, address_of_sizes, count, threads, *rest)
