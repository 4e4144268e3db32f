"""Reading losses without making the program wait.

On the CPU the value of a loss is available at once, and ``_watch.c`` reads it. On an accelerator
``.item()`` would wait for all queued work. So the value is copied to pinned memory on the current
stream, an event is recorded after the copy, and the value is read once the event has completed.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from flatout.intercept.capture import is_capturing

if TYPE_CHECKING:
    import torch

_STREAM_DEVICES = ("cuda", "xpu")
"""Device types with streams, events and pinned host memory in torch (ROCm is ``cuda``)."""


_POLLS_BEFORE_WAIT = 64
"""On a device without events, a loss is read after this many polls even if that blocks, so the
program waits at most once in 64 steps."""


class _Pending:
    """A loss that is being copied from an accelerator to the host.

    Args:
        value: the copy in pinned memory; on a device without events, the loss itself.
        copied: the event that completes with the copy; ``None`` on a device without events.
    """

    __slots__ = ("copied", "polls", "value")

    def __init__(self, value: torch.Tensor, copied: Any) -> None:
        self.value = value
        self.copied = copied
        self.polls = 0

    def has_arrived(self) -> bool:
        """Whether the value can be read without blocking, or has been polled often enough to be
        read anyway."""
        if self.copied is not None:
            return bool(self.copied.query())
        self.polls += 1
        return self.polls > _POLLS_BEFORE_WAIT


def abandon(unread: object) -> None:
    """Keep an object that holds results of ``start_loss_copy`` alive until the process ends.

    This is for the child of a fork, where torch ends the process if an event or pinned memory of
    the parent's device is released.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(unread))


def start_loss_copy(loss: torch.Tensor) -> object:
    """Start copying a loss from an accelerator, before the backward call that starts from it.

    Returns:
        An argument for ``loss_value``; ``None`` if the loss is not a real scalar, or if a CUDA
        graph is being captured.
    """
    import torch

    if loss.numel() != 1 or loss.is_complex() or is_capturing():
        return None
    if loss.device.type in _STREAM_DEVICES:
        value = torch.empty((), dtype=loss.dtype, pin_memory=True)
        value.copy_(loss.detach().reshape(()), non_blocking=True)
        copied = torch.Event(loss.device)
        copied.record(torch.accelerator.current_stream(loss.device))
        return _Pending(value, copied)
    return _Pending(loss.detach(), None)


def arrived_losses(losses: list[object], wait: bool) -> list[float]:
    """Return the values of the first losses, up to one that is still being copied.

    These losses are removed from the list.

    Args:
        losses: floats, and results of ``start_loss_copy``.
        wait: whether to wait for the losses that are still being copied (at the end of the
            program).
    """
    values: list[float] = []
    for loss in losses:
        value = loss_value(loss, wait)
        if value is None:
            break
        values.append(value)
    del losses[: len(values)]
    return values


def loss_value(loss: object, wait: bool) -> float | None:
    """Return the value of a loss, ``None`` while it is still being copied.

    Args:
        loss: a float, or a result of ``start_loss_copy``.
        wait: whether to wait for the copy.
    """
    if isinstance(loss, float):
        return loss
    assert isinstance(loss, _Pending)
    if wait and loss.copied is not None:
        loss.copied.synchronize()
    elif not wait and not loss.has_arrived():
        return None
    return float(loss.value)
