"""Tensors as kernels see them: addresses and numbers of elements."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
"""Types whose elements are where ``data_ptr`` says; a subclass may keep them anywhere."""

_KINDS = frozenset({(torch.float32, True, torch.strided)})
_kind = operator.attrgetter("dtype", "is_cpu", "layout")


def are_contiguous_float32(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether all are contiguous and of float32 on the CPU, as their memory has it."""
    return _are_of_memory(tensors) and all(map(torch.Tensor.is_contiguous, tensors))


def is_dense_float32(tensor: torch.Tensor) -> bool:
    """Whether it is of float32 on the CPU, and its elements are all that lies between its first and
    its last."""
    return _are_of_memory((tensor,)) and (
        tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(tensor))
    )


def _are_of_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether a kernel may take what lies in the memory of all of them for their elements.

    Of a tensor with torch's lazy sign (``z.conj().imag``) it is the negative; an inference tensor
    has no version that could be counted up.
    """
    return (
        PLAIN.issuperset(map(type, tensors))
        and _KINDS.issuperset(map(_kind, tensors))
        and not any(map(torch.Tensor.is_neg, tensors))
        and not any(map(torch.Tensor.is_inference, tensors))
    )


def share_no_memory(written: Sequence[torch.Tensor], read: Sequence[torch.Tensor] = ()) -> bool:
    """Whether no two of them share memory, but for those of ``read`` that begin at one place.

    Args:
        written: dense ones of float32.
        read: others, that are only read: the gradients of a sum are all one.
    """
    end_of = dict(sorted(_spans(read)))  # of several at one place the longest
    apart = len(end_of)
    for start, end in _spans(written):
        end_of[start] = end
        apart += 1
    ordered = sorted(end_of)
    ends = map(end_of.__getitem__, ordered)
    return len(end_of) == apart and all(map(operator.le, ends, ordered[1:]))


def _spans(tensors: Sequence[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Where those that have elements begin and end in memory."""
    starts = map(torch.Tensor.data_ptr, tensors)
    for start, size in zip(starts, map(torch.Tensor.numel, tensors), strict=True):
        if size:
            yield start, start + 4 * size


def find_rows_sharing_memory(
    rows: Sequence[Sequence[torch.Tensor]], is_written: Sequence[bool]
) -> list[bool]:
    """Of each row, whether it shares memory with another one, or within itself, that is written.

    Args:
        rows: of dense tensors of float32.
        is_written: of each place in a row.
    """
    spans = sorted(
        (start := tensor.data_ptr(), start + 4 * tensor.numel(), index, written)
        for index, row in enumerate(rows)
        for tensor, written in zip(row, is_written, strict=True)
        if tensor.numel()
    )
    found = [False] * len(rows)
    # Of all that begin before a span, where they end and whose they are.
    open_written: list[tuple[int, int]] = []
    open_read: list[tuple[int, int]] = []
    for start, end, index, written in spans:
        open_written = [other for other in open_written if other[0] > start]
        met = list(open_written)
        if written:  # those that are read may be many at one place: looked through only then
            open_read = [other for other in open_read if other[0] > start]
            met += open_read
        for _, other_index in met:
            found[index] = found[other_index] = True
        (open_written if written else open_read).append((end, index))
    return found


def call_kernel(
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
