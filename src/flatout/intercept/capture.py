"""Detecting that a CUDA graph is being captured, or that the program is being traced."""

from __future__ import annotations

import functools
from typing import Any


def is_capturing() -> bool:
    """Whether work that is queued now is captured into a graph (a CUDA graph) and not run.

    Operations of flatout must not become part of the program's graphs, and captured results cannot
    be read (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """
    return any(
        device.is_initialized() and device.is_current_stream_capturing()
        for device in _capturing_devices()
    )


@functools.cache
def _capturing_devices() -> tuple[Any, ...]:
    """Return torch's device modules that can capture graphs. The result is cached, because
    ``is_capturing`` is called several times in each step."""
    import torch

    devices: tuple[Any, ...] = (torch.cuda, torch.xpu)
    return tuple(
        device
        for device in devices
        if device._is_compiled() and hasattr(device, "is_current_stream_capturing")
    )


def is_traced() -> bool:
    """Whether the program is traced by ``torch.jit.trace``, ``torch.export`` or ``make_fx``."""
    import torch

    mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return (
        torch._C._get_tracing_state() is not None
        or mode(keys.FAKE) is not None
        or mode(keys.PROXY) is not None
    )
