"""Modes of torch that the program may be in while something of ours computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from flatout.intercept import device


def autocast_devices() -> list[str]:
    """The device types in use that have autocast."""
    accelerator = device.accelerator_in_use()
    types = ["cpu"] if accelerator is None else ["cpu", accelerator.type]
    return [name for name in types if torch.amp.is_autocast_available(name)]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Compute as if the program had not turned autocast on."""
    with contextlib.ExitStack() as stack:
        for name in autocast_devices():
            stack.enter_context(torch.autocast(name, enabled=False))
        yield
