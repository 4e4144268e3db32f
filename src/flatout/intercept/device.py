"""Which accelerator the program can compute on, asked without being the first to touch it.

A torch that was built for CUDA names CUDA as its accelerator on machines without a GPU, without a
driver or with one that is too old, and where ``CUDA_VISIBLE_DEVICES`` hides them all. And a
question that reaches the driver is not free: a process that has counted its devices by the CUDA
runtime cannot hand CUDA to its forked children any more
(https://docs.pytorch.org/docs/stable/notes/multiprocessing.html#cuda-in-multiprocessing).
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch


def accelerator() -> torch.device | None:
    """The accelerator that torch was built for, if this machine has one that the program may use.

    ``None``: there is the CPU alone. The answer is not kept: a program may hide devices before it
    begins to use them.
    """
    built_for = torch.accelerator.current_accelerator()
    if built_for is None:
        return None
    backend = torch.get_device_module(built_for)
    if _is_initialized(backend):
        return built_for
    if getattr(backend, "_is_in_bad_fork", bool)():
        return None  # the child of a process that has used it
    if built_for.type != "cuda":
        return built_for if backend.is_available() else None
    # By NVML or amdsmi, which leave forked children alone; torch.cuda.is_available() would not.
    is_there = _driver_serves(torch.version.cuda) and torch.cuda.device_count() > 0
    return built_for if is_there else None


def has_cuda() -> bool:
    """Whether the program may compute on CUDA devices (or on ROCm's, which torch calls so)."""
    found = accelerator()
    return found is not None and found.type == "cuda"


def accelerator_in_use() -> torch.device | None:
    """The accelerator, once this process has begun to use it; costs next to nothing."""
    built_for = torch.accelerator.current_accelerator()
    if built_for is None or not _is_initialized(torch.get_device_module(built_for)):
        return None
    return built_for


def _is_initialized(backend: Any) -> bool:
    """Whether a device module has been used; one that does not tell (MPS) is taken to be."""
    asked = backend.is_initialized if hasattr(backend, "is_initialized") else backend.is_available
    return bool(asked())


@functools.cache
def _driver_serves(built_with: str | None) -> bool:
    """Whether there is an NVIDIA driver that runs what was built with this version of CUDA.

    Within a major version every driver does
    (https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html).

    Args:
        built_with: such as ``"13.0"``; ``None`` for a build for ROCm, whose driver is not asked.
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
