"""Checking whether tensors are finite, and hiding gradients from an optimizer step."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from flatout import kernels
from flatout.intercept import arrays
from flatout.intercept.arrays import are_contiguous_float32, is_dense_float32

SERIAL_BELOW = 65536
"""Number of elements below which one thread checks them."""

stored_gradient: Any = torch._C.TensorBase.grad
"""Torch's descriptor of ``Tensor.grad``. With ``gradients=on_demand``, reading ``Parameter.grad``
computes a deferred gradient; code that only observes uses this descriptor instead."""


def are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN; waits for tensors on an accelerator.

    Args:
        tensors: of any shape, dtype and device.
    """
    kernel = _kernel()
    if kernel is None:
        return _are_finite_one_by_one(tensors)
    if not are_contiguous_float32(tensors):
        is_plain = list(map(is_dense_float32, tensors))
        others = list(itertools.compress(tensors, map(operator.not_, is_plain)))
        if not _are_finite_one_by_one(others):
            return False
        tensors = list(itertools.compress(tensors, is_plain))
    return bool(arrays.call_kernel(kernel, tensors, SERIAL_BELOW))


def unscale(grads: Iterable[torch.Tensor], factor: float) -> list[torch.Tensor]:
    """Multiply gradients in place, without waiting for their device.

    This is what ``torch.amp.GradScaler`` does
    (https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling).

    Args:
        grads: dense or sparse, of any device and dtype.
        factor: the multiplier; 1 leaves every finite element unchanged.

    Returns:
        A scalar tensor for each pair of device and dtype: 1 if some element is not finite, else 0.
    """
    by_device_and_dtype: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for grad in grads:
        values = values_of(grad)
        by_device_and_dtype.setdefault((values.device, values.dtype), []).append(values)
    flags = []
    for (device, _), tensors in by_device_and_dtype.items():
        flag = torch.zeros((), device=device)
        multiplier = torch.full((), factor, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, multiplier)
        flags.append(flag)
    return flags


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the stored elements of a sparse tensor, any other tensor itself."""
    return tensor._values() if tensor.is_sparse else tensor


def gradients(optimizer: Any) -> list[torch.Tensor]:
    """Return the gradients that the next step of an optimizer would use."""
    return [
        grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (grad := parameter.grad) is not None
    ]


class HiddenGradients:
    """Gradients that are hidden from an optimizer step, so that the step skips their parameters."""

    def __init__(self) -> None:
        self._hidden: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hide(self, optimizer: Any) -> None:
        """Hide the gradients of all parameters of an optimizer."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def show(self) -> None:
        """Restore the hidden gradients, except where there are newer ones."""
        for parameter, grad in reversed(self._hidden):
            if parameter.grad is None:
                parameter.grad = grad
        self._hidden.clear()


def _are_finite_one_by_one(tensors: Iterable[torch.Tensor]) -> bool:
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        values = values_of(tensor.detach())
        flags.setdefault(values.device, []).append(values.isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


@functools.cache
def _kernel() -> Callable[..., int] | None:
    """Return the compiled check, ``None`` if it cannot be built or loaded."""
    try:
        check = kernels.load("finite").finite
    except kernels.KernelError:
        return None
    check.restype = ctypes.c_int
    check.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return check
