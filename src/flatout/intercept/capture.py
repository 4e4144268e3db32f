"""Whether a graph of a device's work (a CUDA graph) is being captured, or a program traced."""

from __future__ import annotations

import functools
from typing import Any


def is_capturing() -> bool:
    """Whether what is queued now is recorded into a graph instead of computed.

    Nothing of ours belongs into the program's graphs, and nothing that is recorded can be read
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """
    return any(
        device.is_initialized() and device.is_current_stream_capturing()
        for device in _capturing_devices()
    )


@functools.cache
def _capturing_devices() -> tuple[Any, ...]:
    """Device modules of this torch that have graphs; a build for the CPU alone has none, and no
    time to lose on the question several times a step."""
    import torch

    devices: tuple[Any, ...] = (torch.cuda, torch.xpu)
    return tuple(
        device
        for device in devices
        if device._is_compiled() and hasattr(device, "is_current_stream_capturing")
    )


def is_traced() -> bool:
    """Whether operators are being written down, to be run elsewhere, instead of run:
    ``torch.jit.trace``, ``torch.export``, ``make_fx``."""
    import torch

    mode, keys = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return (
        torch._C._get_tracing_state() is not None
        or mode(keys.FAKE) is not None
        or mode(keys.PROXY) is not None
    )
