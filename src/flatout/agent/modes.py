"""Modes of torch that the program may be in while something of ours computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def autocast_devices() -> list[str]:
    """The device types of this machine that have autocast."""
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu", "cpu" if accelerator is None else accelerator.type}
    return [device for device in devices if torch.amp.is_autocast_available(device)]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute as if the program had not turned autocast on."""
    with contextlib.ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
