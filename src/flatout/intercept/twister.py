"""Bernoulli numbers of torch's generator on the CPU: its own kernel draws them one by one, and
``kernels/twister.c`` many at once."""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable

import torch

from flatout import kernels

ONES = {
    torch.float32: (32, 0x3F80_0000),
    torch.bfloat16: (16, 0x3F80),
    torch.float16: (16, 0x3C00),
    torch.float64: (64, 0x3FF0_0000_0000_0000),
    torch.bool: (8, 1),
    torch.uint8: (8, 1),
    torch.int8: (8, 1),
    torch.int16: (16, 1),
    torch.int32: (32, 1),
    torch.int64: (64, 1),
}
"""For each dtype the number of bits of an element, and those of a one."""

_DRAWN_BITS = 53
"""Random bits of a number (``at::uniform_real_distribution<double>``)."""

_ATTEMPTS = 3
"""Attempts to draw without that another thread draws at the same time."""

_drawing = threading.Lock()
"""Held while numbers are drawn: torch holds a lock of the generator."""

_CHECKED = 1000
"""Numbers that are compared with torch's: more than one table of the generator has."""

_CHECKED_PROBABILITY = 0.3


def agrees() -> bool:
    """Whether ``fill`` can be used, and draws what torch does here. On processors of Intel, torch
    may draw by MKL, from another generator."""
    return _load() is not None and _is_as_torchs()


def can_fill(tensor: torch.Tensor, p: float, generator: torch.Generator | None = None) -> bool:
    """Whether a tensor is dense and of a supported dtype, ``p`` is a probability, and the generator
    one of the CPU."""
    return (
        tensor.is_cpu
        and tensor.dtype in ONES
        and 0.0 <= p <= 1.0
        and (generator is None or generator.device.type == "cpu")
        and is_dense(tensor)
    )


def fill(
    tensor: torch.Tensor,
    p: float,
    generator: torch.Generator | None = None,
    *,
    count: int | None = None,
    start: int = 0,
) -> bool:
    """Fill a tensor in place with ones, each with probability ``p``, and zeros, in the order of
    memory.

    Returns whether that was done. It is not if another thread keeps drawing from the generator
    meanwhile, or if its state is not one that it comes to by itself; torch's kernel must do it.

    Args:
        tensor: see ``can_fill``.
        p: the probability.
        generator: by default that of torch on the CPU.
        count: how many numbers are drawn, by default as many as the tensor has elements.
        start: how many of these come before those of the tensor.
    """
    kernel = _load()
    assert kernel is not None
    elements = tensor.numel()
    bits, one = ONES[tensor.dtype]
    source = torch.default_generator if generator is None else generator
    with _drawing:
        for _ in range(_ATTEMPTS):
            before = source.get_state()
            state = before.clone()
            is_done = kernel(
                state.data_ptr(),
                *(elements if count is None else count, start, start + elements),
                *(math.ceil(p * 2**_DRAWN_BITS), one, bits // 8, tensor.data_ptr()),
            )
            if is_done and torch.equal(source.get_state(), before):
                source.set_state(state)
                return True
    return False


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a stretch of memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    elements = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != elements:
                return False
            elements *= size
    return True


@functools.cache
def _load() -> Callable[..., int] | None:
    """Return the compiled kernel, ``None`` if it cannot be built or loaded."""
    try:
        found = kernels.load("twister").twister_bernoulli
    except kernels.KernelError:
        return None
    found.restype = ctypes.c_int
    found.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
        *(ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int, ctypes.c_void_p),
    ]
    return found


@functools.cache
def _is_as_torchs() -> bool:
    with torch.inference_mode(), torch._C.DisableTorchFunction():
        generators = [torch.Generator().manual_seed(0) for _ in range(2)]
        expected, found = torch.empty(2, _CHECKED, device="cpu", dtype=torch.float32)
        expected.bernoulli_(_CHECKED_PROBABILITY, generator=generators[0])
        fill(found, _CHECKED_PROBABILITY, generators[1])
        states = [generator.get_state() for generator in generators]
        return torch.equal(expected, found) and torch.equal(*states)
