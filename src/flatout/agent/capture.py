"""Whether a graph is being made of what the program does: of a device's work, or by TorchScript."""

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


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` writes down what is done, of tensors even the sizes that are
    read."""
    import torch

    return torch._C._get_tracing_state() is not None


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
