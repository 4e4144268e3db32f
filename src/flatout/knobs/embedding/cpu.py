"""Gradients of embedding bags on the CPU, by ``kernels/embedding.c``.

For 5,088 lookups, torch's own takes 6.8 times as long with a table of 20,000 x 32 (6.2 to 7.5, 10
pairs), 2.4 times with one of 100,000 x 32 (1.7 to 3.4), 0.97 times with one of 100,000 x 128 (0.96
to 0.98), where fresh memory takes most of it (``python benchmarks/kernels.py embedding --pairs
10``, on a Zen 5).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

FEWEST = 1 << 15
"""Elements of a table; below, the way through Python takes as long."""

SUM, MEAN = range(2)
"""Modes, by torch's numbers."""


class Bags(ctypes.Structure):
    """``Bags`` of ``kernels/embedding.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("table", ctypes.c_void_p),
        ("lookups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("looked_up", "bags", "counts", "factors")),
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bag_count", "left_out", "threads")),
    )


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace the operator; returns what puts torch's own back.

    Args:
        library: of ``kernels/embedding.c``.
        on_failure: told when a gradient could not be computed; torch's own has done it then.
    """
    kernel = library.embedding_bags
    kernel.restype = ctypes.c_int
    kernel.argtypes = [ctypes.c_void_p]

    def computed(below: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.Tensor | None:
        return _gradient(kernel, *args, **kwargs)

    functions = {"_embedding_bag_dense_backward": computed}
    return dispatch.override_operators(functions, "CPU", on_failure=on_failure)


def _gradient(
    kernel: Callable[..., int],
    gradient: torch.Tensor,
    indices: torch.Tensor,
    bags: torch.Tensor,
    counts: torch.Tensor,
    maximum_indices: torch.Tensor,
    rows: int,
    scale_grad_by_freq: bool,
    mode: int,
    factors: torch.Tensor | None,
    padding_idx: int = -1,
) -> torch.Tensor | None:
    """The gradient of a table, rows x width; ``None`` for one that is left to torch.

    Args:
        kernel: the compiled part.
        gradient: bags x width.
        indices, bags: the row and the bag of each lookup.
        counts: of the lookups of each bag.
        maximum_indices: of maxima.
        rows: of the table.
        scale_grad_by_freq: whether a row's gradient is divided by the number of its lookups.
        mode: ``SUM``, ``MEAN``, or another.
        factors: of each lookup.
        padding_idx: a row that counts nothing.
    """
    floats = [gradient] if factors is None else [gradient, factors]
    integers = [indices, bags, counts]
    if (
        mode not in (SUM, MEAN)
        or scale_grad_by_freq
        or gradient.dim() != 2
        or rows * gradient.shape[1] < FEWEST
        or any(x.dtype is not torch.float32 for x in floats)
        or any(x.dtype is not torch.int64 for x in integers)
        or bags.numel() != indices.numel()
        or counts.numel() < gradient.shape[0]
        or (factors is not None and factors.numel() != indices.numel())
        or not dispatch.are_plain(*floats, *integers)
    ):
        return None
    gradient, indices, bags, counts = (x.contiguous() for x in (gradient, *integers))
    factors = None if factors is None else factors.contiguous()
    width = gradient.shape[1]
    table = torch.empty(rows, width, dtype=torch.float32, device="cpu")
    asked = Bags(
        *(rows, width, table.data_ptr(), indices.numel(), indices.data_ptr(), bags.data_ptr()),
        counts.data_ptr() if mode == MEAN else None,
        None if factors is None else factors.data_ptr(),
        *(gradient.data_ptr(), gradient.shape[0], padding_idx, torch.get_num_threads()),
    )
    return None if kernel(ctypes.addressof(asked)) else table
