"""Reading losses without making the program wait.

On the CPU a loss is there as soon as its tensor is (``_watch.c`` reads it). On an accelerator
``.item()`` would wait for everything queued before it, so the value is copied to pinned memory
behind the work that computes it, with an event after the copy, and read once the event has come
to pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


class LossReader:
    """Turns loss tensors into numbers, late where that saves a synchronisation.

    Attributes:
        peak_device_bytes: most memory that torch had allocated on the accelerator, as of the last
            loss that was read from it; ``None`` where there is none.
    """

    def __init__(self) -> None:
        self.peak_device_bytes: int | None = None

    def read(self, loss: torch.Tensor) -> object:
        """Take note of the loss on an accelerator that backward is about to start from.

        Returns what ``number`` turns into one later, ``None`` if it is no real number.
        """
        import torch

        if loss.numel() != 1 or loss.is_complex():
            return None
        if loss.device.type in _STREAM_DEVICES:
            value = torch.empty((), dtype=loss.dtype, pin_memory=True)
            value.copy_(loss.detach().reshape(()), non_blocking=True)
            copied = torch.Event(loss.device.type)
            copied.record()
            return _Pending(value, copied)
        return _Pending(loss.detach(), None)

    def arrived(self, losses: list[object], wait: bool) -> list[float]:
        """The numbers behind the first of ``losses``, up to one that is still on its way.

        They are taken out of the list.

        Args:
            losses: numbers, and what ``read`` returned.
            wait: wait for those on their way (at the end of the program).
        """
        numbers: list[float] = []
        for loss in losses:
            number = loss if isinstance(loss, float) else self.number(loss, wait)
            if number is None:
                break
            numbers.append(number)
        del losses[: len(numbers)]
        return numbers

    def number(self, loss: object, wait: bool) -> float | None:
        """The number behind a loss, ``None`` while it is still on its way.

        Args:
            loss: a number, or what ``read`` returned.
            wait: wait for it.
        """
        if isinstance(loss, float):
            return loss
        assert isinstance(loss, _Pending)
        if wait and loss.copied is not None:
            loss.copied.synchronize()
        elif not wait and not loss.has_arrived():
            return None
        self._note_peak_memory()
        return float(loss.value)

    def _note_peak_memory(self) -> None:
        import torch

        accelerator = torch.accelerator.current_accelerator()
        if accelerator is not None:
            device_module = torch.get_device_module(accelerator)
            self.peak_device_bytes = device_module.max_memory_allocated()
