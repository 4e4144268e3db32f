"""Finding the accelerator that the program can use, without initializing it.

A torch that was built for CUDA reports CUDA as its accelerator even on machines without a GPU,
without a driver or with one that is too old, and if ``CUDA_VISIBLE_DEVICES`` hides all GPUs. And
querying the driver has a side effect: once a process has counted its devices by the CUDA runtime,
its forked children cannot use CUDA
(https://docs.pytorch.org/docs/stable/notes/multiprocessing.html#cuda-in-multiprocessing).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch


def accelerator() -> torch.device | None:
    """Return the accelerator that torch was built for, if this machine has one that the program may
    use, else ``None``.

    The result is not cached, because a program may hide devices before it begins to use them.
    """
    built_for = torch.accelerator.current_accelerator()
    if built_for is None:
        return None
    backend = torch.get_device_module(built_for)
    if _is_initialized(backend):
        return built_for
    if getattr(backend, "_is_in_bad_fork", lambda: False)():
        return None  # this process is a forked child of one that has initialized the accelerator
    if built_for.type != "cuda":
        return built_for if backend.is_available() else None
    # device_count uses NVML or amdsmi, which do not affect forked children; is_available would.
    is_there = _driver_serves(torch.version.cuda) and torch.cuda.device_count() > 0
    return built_for if is_there else None


def has_cuda() -> bool:
    """Whether the program may use CUDA devices, or ROCm devices, which torch calls ``cuda`` as
    well."""
    found = accelerator()
    return found is not None and found.type == "cuda"


def accelerator_in_use() -> torch.device | None:
    """Return the accelerator if this process has initialized it, else ``None``. This is cheap."""
    built_for = torch.accelerator.current_accelerator()
    if built_for is None or not _is_initialized(torch.get_device_module(built_for)):
        return None
    return built_for


def peak_device_bytes() -> int | None:
    """Return the largest amount of memory that torch has had allocated on one accelerator so far.

    It is ``None`` if no accelerator has been used, or if torch does not report the amount (MPS).
    """
    accelerator = accelerator_in_use()
    if accelerator is None:
        return None
    backend = torch.get_device_module(accelerator)
    if not hasattr(backend, "max_memory_allocated"):
        return None
    numbers = range(torch.accelerator.device_count())
    return max(int(backend.max_memory_allocated(number)) for number in numbers) or None


def _is_initialized(backend: Any) -> bool:
    """Whether a backend has been initialized. A backend without ``is_initialized`` (MPS) counts as
    initialized if it is available."""
    query = backend.is_initialized if hasattr(backend, "is_initialized") else backend.is_available
    return bool(query())


@functools.cache
def _driver_serves(built_with: str | None) -> bool:
    """Whether the NVIDIA driver supports programs built with this version of CUDA.

    Drivers support all minor versions of their major version
    (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).

    Args:
        built_with: the version of CUDA that torch was built with, such as ``"13.0"``; ``None`` for
            ROCm, whose driver is not checked.
    """
    if built_with is None:
        return True
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    version = ctypes.c_int(0)  # 1000 * major + 10 * minor; the one call that needs no cuInit
    return driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value // 1000 >= int(
        built_with.partition(".")[0]
    )
