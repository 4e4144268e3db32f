"""Replace the gradients of embedding bags on the CPU by ``kernels/embedding.c``.

With 5,088 lookups, the speedup over torch's kernel is 6.8 for a weight of 20,000 x 32 (6.2 to 7.5,
10 pairs), 2.4 for 100,000 x 32 (1.7 to 3.4), and 0.97 for 100,000 x 128 (0.96 to 0.98), where most
of the time goes into fresh memory (``python benchmarks/kernels.py embedding --pairs 10``, on a Zen
5).
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
"""Weights with fewer elements are left to torch: the call through Python takes as long."""

SUM, MEAN = range(2)
"""The modes, by their numbers in torch."""


class Bags(ctypes.Structure):
    """The same as ``Bags`` in ``kernels/embedding.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("weight_gradient", ctypes.c_void_p),
        ("lookups", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("indices", "bags", "counts", "factors")),
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bag_count", "padding_idx", "threads")),
    )


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace the operator; returns the undo.

    Args:
        library: compiled from ``kernels/embedding.c``.
        on_failure: called with the exception if the kernel fails; torch's kernel is then used.
    """
    kernel = library.embedding_bags
    kernel.restype = ctypes.c_int
    kernel.argtypes = [ctypes.c_void_p]

    def backward(
        torch_kernel: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor | None:
        return _gradient(kernel, *args, **kwargs)

    functions = {"_embedding_bag_dense_backward": backward}
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
    """Compute the gradient of a weight, rows x width; ``None`` if it is left to torch.

    Args:
        kernel: the compiled kernel.
        gradient: the gradient of the output; bags x width.
        indices: the row of the weight of each lookup.
        bags: the bag of each lookup.
        counts: the number of lookups of each bag.
        maximum_indices: used only by the mode ``max``, which is left to torch.
        rows: the number of rows of the weight.
        scale_grad_by_freq: whether a row's gradient is divided by the number of its lookups.
        mode: ``SUM``, ``MEAN``, or the number of another mode.
        factors: the factor of each lookup (``per_sample_weights``), or ``None``.
        padding_idx: a row that is ignored, or -1.
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
        or not dispatch.may_use_kernel(*floats, *integers)
    ):
        return None
    gradient, indices, bags, counts = (x.contiguous() for x in (gradient, *integers))
    factors = None if factors is None else factors.contiguous()
    width = gradient.shape[1]
    weight_gradient = torch.empty(rows, width, dtype=torch.float32, device="cpu")
    arguments = Bags(
        *(rows, width, weight_gradient.data_ptr()),
        *(indices.numel(), indices.data_ptr(), bags.data_ptr()),
        counts.data_ptr() if mode == MEAN else None,
        None if factors is None else factors.data_ptr(),
        *(gradient.data_ptr(), gradient.shape[0], padding_idx, torch.get_num_threads()),
    )
    return None if kernel(ctypes.addressof(arguments)) else weight_gradient
