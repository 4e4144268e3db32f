"""The operators of the knob ``elementwise`` on the CPU, by ``kernels/elementwise.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

FEWEST = 1 << 15
"""Elements; below, torch computes on one thread, and the way through Python would count."""

TANH, GELU = range(2)
"""As in ``kernels/elementwise.c``."""

DTYPES = (torch.float32, torch.bfloat16)


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace the operators; returns what puts torch's own back.

    Args:
        library: of ``kernels/elementwise.c``.
        on_failure: told when something could not be computed; torch's own kernel has done it then.
    """
    activation, magnitude = library.activation, library.magnitude
    address = ctypes.c_void_p
    activation.restype = magnitude.restype = None
    activation.argtypes = [ctypes.c_int, *[address] * 3, ctypes.c_int64, *[ctypes.c_int] * 2]
    magnitude.argtypes = [address, address, ctypes.c_int64, ctypes.c_int]

    def computed(
        function: int, x: torch.Tensor, gradient: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if not _can_take(x, DTYPES):
            return None
        made = torch.empty_like(x)
        if gradient is not None:
            if (
                gradient.dtype is not x.dtype
                or gradient.shape != x.shape
                or not dispatch.are_plain(gradient)
            ):
                return None
            if gradient.stride() != x.stride():
                gradient = torch.empty_like(x).copy_(gradient)
        outer = None if gradient is None else gradient.data_ptr()
        is_bf16 = x.dtype is torch.bfloat16
        threads = torch.get_num_threads()
        activation(function, x.data_ptr(), outer, made.data_ptr(), x.numel(), is_bf16, threads)
        return made

    def tanh(below: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
        return computed(TANH, x)

    def gelu(
        below: Callable[..., Any], x: torch.Tensor, *, approximate: str = "none"
    ) -> torch.Tensor | None:
        return computed(GELU, x) if approximate == "tanh" else None

    def gelu_backward(
        below: Callable[..., Any],
        gradient: torch.Tensor,
        x: torch.Tensor,
        *,
        approximate: str = "none",
    ) -> torch.Tensor | None:
        return computed(GELU, x, gradient) if approximate == "tanh" else None

    def complex_abs(below: Callable[..., Any], z: torch.Tensor) -> torch.Tensor | None:
        if z.is_conj() or not _can_take(z, (torch.complex64,)):
            return None
        made = torch.empty_like(z, dtype=torch.float32)
        magnitude(z.data_ptr(), made.data_ptr(), z.numel(), torch.get_num_threads())
        return made

    functions: dict[str, dispatch.Override]
    functions = {"tanh": tanh, "gelu": gelu, "gelu_backward": gelu_backward, "abs": complex_abs}
    return dispatch.override_operators(functions, "CPU", on_failure=on_failure)


def _can_take(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether it is a plain tensor of one of these types whose elements lie side by side."""
    return (
        x.dtype in dtypes
        and x.numel() >= FEWEST
        and dispatch.are_plain(x)
        and (x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(x)))
    )
