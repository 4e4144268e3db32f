"""Leaving the program's autocast while flatout computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flatout.intercept import device


def autocast_devices() -> list[str]:
    """Return the device types that are in use and have autocast."""
    accelerator = device.accelerator_in_use()
    types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [name for name in types if torch.amp.is_autocast_available(name)]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """A context in which autocast is disabled on all devices."""
    with contextlib.ExitStack() as stack:
        for name in autocast_devices():
            stack.enter_context(torch.autocast(name, enabled=False))
        yield
