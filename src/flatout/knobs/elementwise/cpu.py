"""Replace elementwise operators on the CPU by ``kernels/elementwise.c``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

FEWEST = 1 << 15
"""Tensors with fewer elements are left to torch: the call through Python takes too long for
them."""

TANH, GELU = range(2)
"""The functions, numbered as in ``kernels/elementwise.c``."""

DTYPES = (torch.float32, torch.bfloat16)


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace the operators; returns the undo.

    Args:
        library: compiled from ``kernels/elementwise.c``.
        on_failure: called with the exception if a kernel fails; torch's kernel is then used.
    """
    activation, magnitude = library.activation, library.magnitude
    address = ctypes.c_void_p
    activation.restype = magnitude.restype = None
    activation.argtypes = [ctypes.c_int, *[address] * 3, ctypes.c_int64, *[ctypes.c_int] * 2]
    magnitude.argtypes = [address, address, ctypes.c_int64, ctypes.c_int]

    compute = functools.partial(_compute, activation)

    def tanh(torch_kernel: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
        return compute(TANH, x)

    def gelu(
        torch_kernel: Callable[..., Any], x: torch.Tensor, *, approximate: str = "none"
    ) -> torch.Tensor | None:
        return compute(GELU, x) if approximate == "tanh" else None

    def gelu_backward(
        torch_kernel: Callable[..., Any],
        gradient: torch.Tensor,
        x: torch.Tensor,
        *,
        approximate: str = "none",
    ) -> torch.Tensor | None:
        return compute(GELU, x, gradient) if approximate == "tanh" else None

    def complex_abs(torch_kernel: Callable[..., Any], z: torch.Tensor) -> torch.Tensor | None:
        if z.is_conj() or not _is_supported(z, (torch.complex64,)):
            return None
        result = torch.empty_like(z, dtype=torch.float32)
        magnitude(z.data_ptr(), result.data_ptr(), z.numel(), torch.get_num_threads())
        return result

    functions: dict[str, dispatch.Override]
    functions = {"tanh": tanh, "gelu": gelu, "gelu_backward": gelu_backward, "abs": complex_abs}
    return dispatch.override_operators(functions, "CPU", on_failure=on_failure, may_rest=True)


def _compute(
    activation: Callable[..., None],
    function: int,
    x: torch.Tensor,
    gradient: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The function of each element, or its derivative times ``gradient``; ``None``: not supported.

    Args:
        activation: the kernel.
        function: ``TANH`` or ``GELU``.
        x: the argument of the function.
        gradient: the gradient of the function's values.
    """
    if not _is_supported(x, DTYPES):
        return None
    result = torch.empty_like(x)
    if gradient is not None:
        if (
            gradient.dtype is not x.dtype
            or gradient.shape != x.shape
            or not dispatch.may_use_kernel(gradient)
        ):
            return None
        if gradient.stride() != x.stride():
            gradient = torch.empty_like(x).copy_(gradient)
    gradient_address = None if gradient is None else gradient.data_ptr()
    activation(
        *(function, x.data_ptr(), gradient_address, result.data_ptr(), x.numel()),
        *(x.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    return result


def _is_supported(x: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether ``x`` is a large, dense, plain tensor of one of these dtypes."""
    return (
        x.dtype in dtypes
        and x.numel() >= FEWEST
        and dispatch.may_use_kernel(x)
        and (x.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense.default(x)))
    )
