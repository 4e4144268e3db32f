"""Checking whether tensors are finite."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence

import torch

from flatout import kernels
from flatout.intercept import arrays
from flatout.intercept.arrays import are_contiguous_float32, is_dense_float32

SERIAL_BELOW = 65536
"""The number of elements below which one thread checks them."""


def are_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether no element is infinite or NaN. The call waits for tensors on an accelerator.

    Args:
        tensors: tensors of any shape, dtype and device.
    """
    kernel = _kernel()
    if kernel is None:
        return _are_finite_one_by_one(tensors)
    if not are_contiguous_float32(tensors):
        is_dense = list(map(is_dense_float32, tensors))
        others = list(itertools.compress(tensors, map(operator.not_, is_dense)))
        if not _are_finite_one_by_one(others):
            return False
        tensors = list(itertools.compress(tensors, is_dense))
    return bool(arrays.call_kernel(kernel, tensors, SERIAL_BELOW))


def unscale(grads: Iterable[torch.Tensor], factor: float) -> list[torch.Tensor]:
    """Multiply gradients in place, without waiting for their device.

    This is what ``torch.amp.GradScaler`` does
    (https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling).

    Args:
        grads: dense or sparse gradients, of any device and dtype.
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
    """Return the stored elements of a sparse tensor; return any other tensor itself."""
    return tensor._values() if tensor.is_sparse else tensor


def _are_finite_one_by_one(tensors: Iterable[torch.Tensor]) -> bool:
    flags: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        values = values_of(tensor.detach())
        flags.setdefault(values.device, []).append(values.isfinite().all())
    return all(bool(torch.stack(found).all()) for found in flags.values())


@functools.cache
def _kernel() -> Callable[..., int] | None:
    """Return the compiled check; ``None`` if it cannot be built or loaded."""
    try:
        check = kernels.load("finite").finite
    except kernels.KernelError:
        return None
    check.restype = ctypes.c_int
    check.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return check
