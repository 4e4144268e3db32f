"""Reading losses without making the program wait.

On the CPU a loss is there as soon as its tensor is (``_watch.c`` reads it). On an accelerator
``.item()`` would wait for everything queued before it, so the value is copied to pinned memory
behind the work that computes it, with an event after the copy, and read once the event has come
to pass.
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
"""Steps after which a loss is read from a device without such events: one wait in 64 steps."""


class _Pending:
    """A loss on its way from an accelerator to the host."""

    __slots__ = ("copied", "polls", "value")

    def __init__(self, value: torch.Tensor, copied: Any) -> None:
        self.value = value
        self.copied = copied
        self.polls = 0

    def has_arrived(self) -> bool:
        """Whether reading it will not make the program wait (or is due all the same)."""
        if self.copied is not None:
            return bool(self.copied.query())
        self.polls += 1
        return self.polls > _POLLS_BEFORE_WAIT


def abandon(unread: object) -> None:
    """Keep ``unread``, which holds what ``read_loss`` returned, for as long as the process
    lives: in the child of a fork. There, torch ends the process when an event or pinned memory of
    the parent's device is released.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(unread))


def read_loss(loss: torch.Tensor) -> object:
    """Take note of the loss on an accelerator that backward is about to start from.

    Returns what ``loss_number`` turns into one later, ``None`` if it is no real number, or belongs
    to a graph that is being captured.
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
    """The numbers behind the first of ``losses``, up to one that is still on its way.

    They are taken out of the list.

    Args:
        losses: numbers, and what ``read_loss`` returned.
        wait: wait for those on their way (at the end of the program).
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
    """The number behind a loss, ``None`` while it is still on its way.

    Args:
        loss: a number, or what ``read_loss`` returned.
        wait: wait for it.
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
    """Most memory that torch had allocated on one of the accelerators so far; ``None`` where there
    is none, none has been used, or torch does not tell (MPS)."""
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
