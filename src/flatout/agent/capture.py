"""Whether a graph of a device's work (a CUDA graph) is being captured."""

from __future__ import annotations

from typing import Any


def is_capturing() -> bool:
    """Whether what is queued now is recorded into a graph instead of computed.

    Nothing of ours belongs into the program's graphs, and nothing that is recorded can be read
    (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
    """
    import torch

    devices: tuple[Any, ...] = (torch.cuda, torch.xpu)
    return any(
        device.is_initialized()
        and hasattr(device, "is_current_stream_capturing")
        and device.is_current_stream_capturing()
        for device in devices
    )
