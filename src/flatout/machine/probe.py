"""Measures what the machine can do at most, under the job's own interpreter: run as a script.

Prints one JSON object. A ceiling is a maximum: of several sizes and repetitions the best counts.
Standard library and torch only.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from collections.abc import Callable
from typing import Any

if __name__ == "__main__" and sys.version_info < (3, 11):
    del sys.path[0]  # this folder, whose files would hide others of their names

import torch

DTYPES = ("float32", "bfloat16", "float16", "int8")
SIZES = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 1024))
"""Matrix products (m, k, n) that are tried; the last one is a layer on a large batch."""

ACCELERATOR_SIZES = (*SIZES, (4096, 4096, 4096), (8192, 8192, 8192))
"""Smaller ones do not fill a large accelerator."""

SECONDS_PER_SIZE = 0.4
SECONDS_PER_PRODUCT = 1.0
"""A larger matrix that would take longer is left out: the hardware lacks this dtype."""

COPY_BYTES = 256 * 2**20
"""Beyond every last-level cache of today's machines (up to 256 MiB with its copy)."""

ACCELERATOR_COPY_BYTES = 2**30
"""So many that the start of the copy does not count."""

Matrix = Any


def main() -> None:
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
    """The accelerator that torch was built for, after something was computed on it.

    ``None``: there is none, and why if torch was built for one: no driver, an old one, no visible
    device, or a device that this torch has no kernels for.
    """
    built_for = torch.accelerator.current_accelerator()
    if built_for is None:
        return None, None
    if not torch.accelerator.is_available():
        return None, f"torch was built for {built_for.type}, and finds no such device"
    try:
        torch.ones(2, device=built_for).sum().item()
    except (RuntimeError, AssertionError) as error:  # torch.cuda asserts that it was built for it
        reason = str(error).strip().partition("\n")[0]
        return None, f"torch cannot compute on {built_for.type}: {reason}"
    return built_for, None


def measure(device: torch.device) -> dict[str, Any]:
    """Rates of one device, and what it reports of itself."""
    return {
        "reported": reported(device),
        "matmul_flops_per_s": {
            name: matmul_flops_per_s(device, getattr(torch, name)) for name in DTYPES
        },
        "memory_bytes_per_s": memory_bytes_per_s(device),
    }


def reported(device: torch.device) -> dict[str, Any]:
    """What an accelerator says of itself; empty for the CPU."""
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
        # By default torch says yes to devices that emulate bfloat16, such as the T4.
        facts["bfloat16"] = module.is_bf16_supported(including_emulation=False)
    return facts


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def best_seconds(work: Callable[[], object], device: torch.device, limit_s: float) -> float:
    """Shortest of the repetitions that fit into ``limit_s``, after one that warms up."""
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
    """Best rate of a matrix product, 2mkn operations each; ``None`` if it cannot be computed."""
    best = 0.0
    for m, k, n in SIZES if device.type == "cpu" else ACCELERATOR_SIZES:
        if best and 2 * m * k * n / best > SECONDS_PER_PRODUCT:
            continue
        multiply = product(m, k, n, device, dtype)
        if multiply is None:
            break
        seconds = best_seconds(multiply, device, SECONDS_PER_SIZE)
        best = max(best, 2 * m * k * n / seconds)
    return best or None


def product(
    m: int, k: int, n: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], Matrix] | None:
    """A matrix product ready to run, ``None`` where torch has no kernel or no memory for it."""
    try:
        if dtype == torch.int8:
            a = torch.randint(-8, 8, (m, k), device=device, dtype=dtype)
            b = torch.randint(-8, 8, (n, k), device=device, dtype=dtype).t()

            def multiply() -> Matrix:
                return torch._int_mm(a, b)
        else:
            x = torch.randn(m, k, device=device).to(dtype)
            y = torch.randn(k, n, device=device).to(dtype)

            def multiply() -> Matrix:
                return x @ y

        multiply()
    except (RuntimeError, NotImplementedError):
        return None
    return multiply


def memory_bytes_per_s(device: torch.device) -> float | None:
    """Rate of a copy, bytes read and bytes written both counted; ``None`` without the memory."""
    size_bytes = COPY_BYTES if device.type == "cpu" else ACCELERATOR_COPY_BYTES
    try:
        source = torch.ones(size_bytes // 4, device=device)
        target = torch.empty_like(source)
    except RuntimeError:  # such as torch.OutOfMemoryError
        return None
    seconds = best_seconds(lambda: target.copy_(source), device, 0.5)
    return 2 * size_bytes / seconds


def page_fault_us(pages: int = 16384) -> float | None:
    """Time of a first touch of a 4 KiB page, kernel's zeroing included: best of five."""
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
