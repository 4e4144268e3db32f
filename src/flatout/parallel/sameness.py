"""Whether the ranks are the same: digests of tensors and of random generators."""

from __future__ import annotations

import ctypes
import functools
import random
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch

from flatout import kernels
from flatout.intercept import device, objects
from flatout.intercept.arrays import EXACT_TENSOR_TYPES
from flatout.parallel.devices import to_digest
from flatout.parallel.header import digest

SERIAL_BELOW_BYTES = 1 << 18
"""Size below which one thread reads a tensor."""

_MASK = (1 << 64) - 1


def content_digest(tensors: Iterable[torch.Tensor]) -> int:
    """Return a digest of the elements of tensors. Those that are sparse, quantized or of another
    type are left out."""
    total = 0
    with torch.no_grad():
        for tensor in tensors:
            found = 0
            if _has_elements(tensor):
                found = _hash(to_digest(tensor))
            total = (total * 0x9E3779B97F4A7C15 + found) & _MASK
    return total


def _has_elements(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in EXACT_TENSOR_TYPES
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_meta or tensor.is_quantized)
    )


def structure_digest(tensors: Iterable[torch.Tensor]) -> int:
    """Return a digest of the sizes and dtypes of tensors."""
    return digest([(tuple(t.shape) if not t.is_nested else None, t.dtype) for t in tensors])


def state_digest(roots: Iterable[Any], optimizers: Iterable[Any]) -> int:
    """Return a digest of all parameters, buffers and optimizer states.

    Args:
        roots: modules that were called outermost.
        optimizers: of the program.
    """
    found = objects.state_tensors(roots, optimizers)
    return content_digest({id(tensor): tensor for tensor in found}.values())


class GeneratorStates:
    """The states of the random generators of torch, on the CPU and on the accelerator that is in
    use, of ``random`` and of NumPy, if it is imported."""

    def __init__(self) -> None:
        self._torch = torch.random.get_rng_state()
        accelerator = device.accelerator_in_use()
        self._device = None if accelerator is None else torch.get_device_module(accelerator)
        self._of_device = None if self._device is None else self._device.get_rng_state()
        self._python = random.getstate()
        numpy = sys.modules.get("numpy.random")
        self._numpy = None if numpy is None else numpy.get_state(legacy=False)

    def digest(self) -> int:
        """Return a digest of the states."""
        state: Any = self._numpy
        if state is not None and "key" in state.get("state", ()):
            key = state["state"]["key"].tobytes()
            state = (zlib.crc32(key), state["state"]["pos"], state["has_gauss"], state["gauss"])
        version, words, gauss = self._python
        of_device = 0 if self._of_device is None else _hash(self._of_device)
        return _hash(self._torch) ^ digest((version, hash(words), gauss, state, of_device))

    def restore(self) -> None:
        """Put the generators into these states."""
        torch.random.set_rng_state(self._torch)
        if self._device is not None:
            self._device.set_rng_state(self._of_device)
        random.setstate(self._python)
        numpy = sys.modules.get("numpy.random")
        if numpy is not None and self._numpy is not None:
            numpy.set_state(self._numpy)


def _hash(data: torch.Tensor) -> int:
    """Return a hash of bytes in main memory."""
    size = data.numel()
    if not size:
        return 0
    kernel = _kernel() if _may_use_kernel else None
    if kernel is None:
        return zlib.crc32((ctypes.c_char * size).from_address(data.data_ptr()))
    threads = torch.get_num_threads() if size >= SERIAL_BELOW_BYTES else 1
    return kernel(data.data_ptr(), size, threads)


def agree_on_kernel(exchange: Callable[[bytes], list[bytes]]) -> None:
    """Use the compiled hash on all ranks or on none.

    Args:
        exchange: returns the messages of all ranks.
    """
    global _may_use_kernel
    _may_use_kernel = all(exchange(b"" if _kernel() is None else b"1"))


_may_use_kernel = False


@functools.cache
def _kernel() -> Callable[..., int] | None:
    """Return the compiled hash, ``None`` if it cannot be built or loaded."""
    try:
        fingerprint = kernels.load("fingerprint").fingerprint
    except kernels.KernelError:
        return None
    fingerprint.restype = ctypes.c_uint64
    fingerprint.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return fingerprint
