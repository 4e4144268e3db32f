"""Copying the tensors that training changes: parameters, buffers and optimizer state."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.arrays import EXACT_TENSOR_TYPES
from flatout.intercept.finite import are_finite
from flatout.machine import system

_autograd: Any = torch.autograd

FREE_MEMORY_FACTOR = 4
"""A copy is made only if the free memory is at least this many times the size of the copy."""


class Snapshot:
    """The last copy of the tensors of some modules and optimizers.

    The tensors of the program are referred to weakly only.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = []

    def take(self, roots: Iterable[Any], optimizers: Iterable[Any]) -> str | None:
        """Replace the last copy by a new copy.

        Args:
            roots: the root modules.
            optimizers: the optimizers.

        Returns:
            The reason if there is not enough memory; the last copy is then unchanged. ``None`` if
            there is a new copy.
        """
        before = {id(ref()): copy for ref, copy in self._copies}
        tensors = _tensors(roots, optimizers)
        new = [t for t in tensors if not _matches(t, before.get(id(t)))]
        why = _explain_lack_of_memory(new)
        if why is not None:
            return why
        copies = []
        with torch.no_grad():
            for tensor in tensors:
                copy = before.get(id(tensor))
                if copy is None or not _matches(tensor, copy):
                    copy = torch.empty_like(tensor, requires_grad=False)
                copy.copy_(tensor, non_blocking=True)
                copies.append((weakref.ref(tensor), copy))
        self._copies = copies
        return None

    def restore(self) -> bool:
        """Restore the tensors from the copy; return whether there is a copy."""
        for tensor, copy in self._pairs():
            _write(tensor, copy)
        return bool(self._copies)

    def restore_buffers(self, roots: Iterable[Any]) -> int:
        """Restore the buffers that are not finite and whose copies are finite.

        Args:
            roots: the root modules.

        Returns:
            The number of restored buffers.
        """
        buffers = {id(buffer) for root in roots for buffer in objects.buffers(root)}
        restored = 0
        for tensor, copy in self._pairs():
            if (
                id(tensor) in buffers
                and tensor.is_floating_point()
                and not are_finite([tensor])
                and are_finite([copy])
            ):
                _write(tensor, copy)
                restored += 1
        return restored

    def _pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for reference, copy in self._copies:
            tensor = reference()
            if tensor is not None and _matches(tensor, copy):
                yield tensor, copy


def weights_are_finite(roots: Iterable[Any]) -> bool:
    """Whether all trainable parameters are finite. Frozen parameters may be masks with
    infinities."""
    trained = {id(p): p for root in roots for p in objects.parameters(root) if p.requires_grad}
    return are_finite([p for p in trained.values() if type(p) in EXACT_TENSOR_TYPES])


def size_bytes(roots: Iterable[Any], optimizers: Iterable[Any]) -> int:
    """Return the size of a copy in bytes."""
    return sum(t.numel() * t.element_size() for t in _tensors(roots, optimizers))


def _tensors(roots: Iterable[Any], optimizers: Iterable[Any]) -> list[torch.Tensor]:
    """Return the tensors to copy, each once, except tensor subclasses and sparse tensors."""
    found = objects.state_tensors(roots, optimizers)
    once = {id(t): t for t in found if type(t) in EXACT_TENSOR_TYPES and t.layout is torch.strided}
    return list(once.values())


def _matches(tensor: torch.Tensor, copy: torch.Tensor | None) -> bool:
    return (
        copy is not None
        and tensor.shape == copy.shape
        and tensor.dtype == copy.dtype
        and tensor.device == copy.device
    )


def _write(tensor: torch.Tensor, copy: torch.Tensor) -> None:
    """Write a tensor in place without a new version, so that a graph that has saved the tensor
    stays valid."""
    with torch.no_grad(), _autograd._unsafe_preserve_version_counter(tensor):
        tensor.copy_(copy)


def _explain_lack_of_memory(tensors: Iterable[torch.Tensor]) -> str | None:
    """Return the reason why copies of these tensors do not fit into memory; ``None`` if they do."""
    needed: dict[torch.device, int] = {}
    for tensor in tensors:
        tensor_bytes = tensor.numel() * tensor.element_size()
        needed[tensor.device] = needed.get(tensor.device, 0) + tensor_bytes
    for device, needed_bytes in needed.items():
        free_bytes = _free_bytes(device)
        if free_bytes is None:
            return f"the free memory of {device} is not known"
        if free_bytes < FREE_MEMORY_FACTOR * needed_bytes:
            return (
                f"a copy takes {needed_bytes / 2**20:.0f} MiB, and only "
                f"{free_bytes / 2**20:.0f} MiB of {device} are free"
            )
    return None


def _free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device; ``None`` if it is not known."""
    if device.type == "cpu":
        return system.available_bytes()
    mem_get_info = getattr(torch.get_device_module(device), "mem_get_info", None)
    return None if mem_get_info is None else int(mem_get_info(device)[0])
