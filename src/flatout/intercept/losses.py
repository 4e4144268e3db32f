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
"""Checks after which a loss on a device without such events is read all the same, so that there is
one wait in 64 steps."""


class _Pending:
    """A loss that is being copied from an accelerator to the host."""

    __slots__ = ("copied", "polls", "value")

    def __init__(self, value: torch.Tensor, copied: Any) -> None:
        self.value = value
        self.copied = copied
        self.polls = 0

    def has_arrived(self) -> bool:
        """Whether reading the value makes no one wait, or is due all the same."""
        if self.copied is not None:
            return bool(self.copied.query())
        self.polls += 1
        return self.polls > _POLLS_BEFORE_WAIT


def abandon(unread: object) -> None:
    """Keep an object that holds results of ``read_loss`` alive until the process ends.

    This is for the child of a fork, where torch ends the process if an event or pinned memory of
    the parent's device is released.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(unread))


def read_loss(loss: torch.Tensor) -> object:
    """Start copying a loss from an accelerator, before the backward call that starts from it.

    Returns:
        An object for ``loss_number``; ``None`` if the loss is not a real scalar, or if a CUDA graph
        is being captured.
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
        losses: numbers, and results of ``read_loss``.
        wait: wait for the losses that are still being copied (at the end of the program).
    """
    numbers: list[float] = []
    for loss in losses:
        number = loss_number(loss, wait)
        if number is None:
            break
        numbers.append(number)
    del losses[: len(numbers)]
    return numbers


def loss_number(loss: object, wait: bool) -> float | None:
    """Return the value of a loss, ``None`` while it is still being copied.

    Args:
        loss: a number, or a result of ``read_loss``.
        wait: wait for the copy.
    """
    if isinstance(loss, float):
        return loss
    assert isinstance(loss, _Pending)
    if wait and loss.copied is not None:
        loss.copied.synchronize()
    elif not wait and not loss.has_arrived():
        return None
    return float(loss.value)


def peak_device_bytes() -> int | None:
    """Return the peak of the memory that torch has allocated on one accelerator so far.

    It is ``None`` if no accelerator has been used, or if torch does not report it (MPS).
    """
    import torch

    from flatout.intercept import device

    accelerator = device.accelerator_in_use()
    if accelerator is None:
        return None
    backend = torch.get_device_module(accelerator)
    if not hasattr(backend, "max_memory_allocated"):
        return None
    numbers = range(torch.accelerator.device_count())
    return max(int(backend.max_memory_allocated(number)) for number in numbers) or None
