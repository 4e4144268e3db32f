"""Takes rows of tensors, stacked as torch's ``default_collate`` stacks them."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch

LARGEST_BYTES = 1 << 18
"""Larger batches are copied by torch, on all threads. So is the memory of a tensor that holds the
conjugated or negated elements (``z.conj()``, ``z.conj().imag``)."""


class Rows:
    """Takes rows of tensors.

    Args:
        library: compiled from ``kernels/rows.c``; ``None``: torch copies all batches.
    """

    def __init__(self, library: ctypes.CDLL | None) -> None:
        self._take = None if library is None else library.take_rows
        if self._take is not None:
            pointer, number = ctypes.c_void_p, ctypes.c_int64
            self._take.restype = ctypes.c_int
            self._take.argtypes = [pointer, number, number, number, pointer, pointer, pointer]

    def take(self, tensors: Sequence[torch.Tensor], wanted: list[int]) -> list[torch.Tensor] | None:
        """Return some rows of each tensor; ``None``: a row is wanted that they do not have.

        Args:
            tensors: contiguous tensors on the CPU, of at least one dimension.
            wanted: the numbers of the rows, of type ``int``.
        """
        rows = min(tensor.shape[0] for tensor in tensors)
        if rows == 0:
            return None
        count = len(wanted)
        row_bytes = [tensor.nbytes // tensor.shape[0] for tensor in tensors]
        is_large = count * sum(row_bytes) > LARGEST_BYTES
        if self._take is None or is_large or any(t.is_conj() or t.is_neg() for t in tensors):
            if min(wanted) < 0 or max(wanted) >= rows:
                return None
            indices = torch.tensor(wanted, device="cpu")
            return [tensor.index_select(0, indices) for tensor in tensors]
        try:
            numbers = array("q", wanted)
        except OverflowError:
            return None
        taken = [tensor.new_empty((count, *tensor.shape[1:])) for tensor in tensors]
        sources = array("Q", map(torch.Tensor.data_ptr, tensors))
        targets = array("Q", map(torch.Tensor.data_ptr, taken))
        arrays = (numbers, sources, targets, array("q", row_bytes))
        indices_at, *others_at = (one.buffer_info()[0] for one in arrays)
        status = self._take(indices_at, count, rows, len(taken), *others_at)
        return taken if status == 0 else None
