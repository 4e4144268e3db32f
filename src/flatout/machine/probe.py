"""Measures the peak rates of the machine; run as a script by the job's interpreter.

It prints one JSON object. Each rate is the best of several sizes and repetitions. The script
imports the standard library and torch only.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__" and sys.version_info < (3, 11):
    del sys.path[0]  # this folder, whose files would shadow other modules

import torch

DTYPES = ("float32", "bfloat16", "float16", "int8")
SIZES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
"""Matmuls that are measured, of (m, k) by (k, n); the last one is a layer on a large batch."""

ACCELERATOR_SIZES = (*SIZES, (4096, 4096, 4096), (8192, 8192, 8192))
"""The larger matmuls are needed to use a large accelerator fully."""

SIZE_SECONDS = 0.4
LONGEST_MATMUL_SECONDS = 1.0
"""A size is skipped if one matmul would take longer, as on hardware without units for the dtype."""

COPY_BYTES = 256 * 2**20
"""Larger, together with its copy, than the last-level cache of common machines."""

ACCELERATOR_COPY_BYTES = 2**30
"""Large enough that the latency of starting the copy does not matter."""


def main() -> None:
    """Measure all devices and print the rates."""
    accelerator, why_not = usable_accelerator()
    devices = [torch.device("cpu")] + ([accelerator] if accelerator is not None else [])
    report = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "page_fault_us": page_fault_us(),
        "devices": {device.type: measure(device) for device in devices},
        "no_accelerator": why_not,
    }
    json.dump(report, sys.stdout)


def usable_accelerator() -> tuple[torch.device | None, str | None]:
    """Return the accelerator that torch was built for, after computing something on it.

    Returns:
        The accelerator, or ``None``; and in that case the reason if torch was built for one: no
        driver, an old driver, no visible device, or a device for which this torch has no kernels.
    """
    built_for = torch.accelerator.current_accelerator()
    if built_for is None:
        return None, None
    if not torch.accelerator.is_available():
        return None, f"torch was built for {built_for.type}, and finds no such device"
    try:
        torch.ones(2, device=built_for).sum().item()
    except (RuntimeError, AssertionError) as error:  # torch.cuda raises AssertionError without CUDA
        reason = str(error).strip().partition("\n")[0]
        return None, f"torch cannot compute on {built_for.type}: {reason}"
    return built_for, None


def measure(device: torch.device) -> dict[str, Any]:
    """Return the rates of a device, and the properties that it reports."""
    return {
        "reported": read_properties(device),
        "matmul_flops_per_s": {
            name: matmul_flops_per_s(device, getattr(torch, name)) for name in DTYPES
        },
        "memory_bytes_per_s": memory_bytes_per_s(device),
    }


def read_properties(device: torch.device) -> dict[str, Any]:
    """Return the properties that an accelerator reports; none for the CPU."""
    if device.type == "cpu":
        return {}
    module = torch.get_device_module(device)
    facts: dict[str, Any] = {"count": torch.accelerator.device_count()}
    if hasattr(module, "get_device_name"):
        facts["name"] = module.get_device_name()
    if hasattr(module, "get_device_properties"):
        properties = module.get_device_properties(0)
        for name in ("total_memory", "multi_processor_count", "gcnArchName"):
            if hasattr(properties, name):
                facts[name] = getattr(properties, name)
    if hasattr(module, "get_device_capability"):
        facts["capability"] = str(module.get_device_capability())
    if hasattr(module, "is_bf16_supported"):
        # By default torch returns true for devices that emulate bfloat16, such as the T4.
        facts["bfloat16"] = module.is_bf16_supported(including_emulation=False)
    return facts


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def best_time_s(work: Callable[[], object], device: torch.device, limit_s: float) -> float:
    """Return the shortest time of the calls of ``work`` within ``limit_s``, after one to warm
    up."""
    work()
    synchronize(device)
    best_s = float("inf")
    deadline_s = time.perf_counter() + limit_s
    while time.perf_counter() < deadline_s or best_s == float("inf"):
        started_s = time.perf_counter()
        work()
        synchronize(device)
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Return the best rate of a matmul (2mkn operations), ``None`` if the dtype is not
    supported."""
    best = 0.0
    for m, k, n in SIZES if device.type == "cpu" else ACCELERATOR_SIZES:
        if best and 2 * m * k * n / best > LONGEST_MATMUL_SECONDS:
            continue
        matmul = prepare_matmul(m, k, n, device, dtype)
        if matmul is None:
            break
        seconds = best_time_s(matmul, device, SIZE_SECONDS)
        best = max(best, 2 * m * k * n / seconds)
    return best or None


def prepare_matmul(
    m: int, k: int, n: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Any] | None:
    """Return a function that multiplies two matrices, ``None`` without a kernel or enough
    memory."""
    try:
        if dtype == torch.int8:
            a = torch.randint(-8, 8, (m, k), device=device, dtype=dtype)
            b = torch.randint(-8, 8, (n, k), device=device, dtype=dtype).t()

            def multiply() -> Any:
                return torch._int_mm(a, b)
        else:
            x = torch.randn(m, k, device=device).to(dtype)
            y = torch.randn(k, n, device=device).to(dtype)

            def multiply() -> Any:
                return x @ y

        multiply()
    except (RuntimeError, NotImplementedError):
        return None
    return multiply


def memory_bytes_per_s(device: torch.device) -> float | None:
    """Return the rate of a copy, bytes read plus bytes written, ``None`` without enough memory."""
    size_bytes = COPY_BYTES if device.type == "cpu" else ACCELERATOR_COPY_BYTES
    try:
        source = torch.ones(size_bytes // 4, device=device)
        target = torch.empty_like(source)
    except RuntimeError:  # such as torch.OutOfMemoryError
        return None
    seconds = best_time_s(lambda: target.copy_(source), device, 0.5)
    return 2 * size_bytes / seconds


def page_fault_us(pages: int = 16384) -> float | None:
    """Return the time of the first write to a 4 KiB page, which the kernel zeroes; best of five."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return None
    best_s = float("inf")
    for _ in range(5):
        with mmap.mmap(-1, pages * mmap.PAGESIZE) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            view = torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE]
            started_s = time.perf_counter()
            view.fill_(1)
            best_s = min(best_s, time.perf_counter() - started_s)
            del view
    return best_s / pages * 1e6


if __name__ == "__main__":
    main()
