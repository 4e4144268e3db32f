"""What a shared call changes besides its output, and how that is put back."""

from __future__ import annotations

from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.arrays import EXACT_TENSOR_TYPES
from flatout.parallel.header import digest
from flatout.parallel.kinds import SCALARS
from flatout.parallel.sameness import GeneratorStates, content_digest

_autograd: Any = torch.autograd

SMALL_BYTES = 1 << 20
"""Size up to which a buffer is copied before every call."""


class Changes:
    """What a call may change besides its output: attributes and buffers of the module, the random
    generators, and, which cannot be put back, parameters and large buffers.

    Args:
        module: the root module.
        tree: the modules in it.
        copied: paths of large buffers that are copied too.
        copies_all: whether all buffers are copied.

    Attributes:
        changed_buffers: the paths of those that have changed when ``digest`` was called.
    """

    def __init__(self, module: Any, tree: objects.Tree, copied: set[str], copies_all: bool) -> None:
        self._module = module
        self._held = tree.held
        self._attributes = list(map(dict, self._held))
        self._registries = [dict(held.get("_buffers") or {}) for held in self._held]
        self._parameters = tree.parameters()
        self._parameter_versions = list(map(_version, self._parameters))
        self._buffers = dict(tree.named_buffers())
        self._versions = {path: _version(buffer) for path, buffer in self._buffers.items()}
        norms = _paths_in_norms(tree)
        self._copies = {
            path: buffer.detach().clone()
            for path, buffer in self._buffers.items()
            if type(buffer) in EXACT_TENSOR_TYPES
            and (copies_all or path in copied or path in norms or _size(buffer) <= SMALL_BYTES)
        }
        self._states = GeneratorStates()
        self.changed_buffers: list[str] = []

    def digest(self) -> int:
        """Return a digest of what has changed, but for the random generators."""
        now = dict(objects.named_buffers(self._module))
        self.changed_buffers = sorted(
            path
            for path in {**now, **self._buffers}
            if now.get(path) is not self._buffers.get(path) or self._has_changed(path)
        )
        tensors = [now[path] for path in self.changed_buffers if path in now]
        described: list[object] = [self.changed_buffers]
        for number, (held, before) in enumerate(zip(self._held, self._attributes, strict=True)):
            for name, value in list(held.items()):
                if before.get(name, self) is value:
                    continue
                described.append((number, name, type(value)))
                if type(value) in SCALARS:
                    described.append(value)
                elif type(value) in EXACT_TENSOR_TYPES:
                    tensors.append(value)
            described += (name for name in before if name not in held)
        tensors += self._changed_parameters()
        return digest(described) ^ content_digest(tensors)

    def can_be_undone(self) -> bool:
        """Whether nothing has changed of which there is no copy."""
        return not self._changed_parameters() and all(
            path in self._copies or not self._has_changed(path) for path in self._buffers
        )

    def undo(self) -> None:
        """Put attributes, buffers and generators back, without new versions."""
        self._states.restore()
        for path, copy in self._copies.items():
            if self._has_changed(path):
                buffer = self._buffers[path]
                with torch.no_grad(), _autograd._unsafe_preserve_version_counter(buffer):
                    buffer.copy_(copy)
        for held, before in zip(self._held, self._attributes, strict=True):
            _put_back(held, before)
        for before, registry in zip(self._attributes, self._registries, strict=True):
            if "_buffers" in before:
                _put_back(before["_buffers"], registry)

    def _has_changed(self, path: str) -> bool:
        # Statistics of a batch norm change without a new version.
        buffer, copy = self._buffers[path], self._copies.get(path)
        if self._versions[path] != _version(buffer):
            return True
        return copy is not None and not (copy.shape == buffer.shape and torch.equal(copy, buffer))

    def _changed_parameters(self) -> list[torch.Tensor]:
        pairs = zip(self._parameters, self._parameter_versions, strict=True)
        return [parameter for parameter, version in pairs if _version(parameter) != version]


def _put_back(held: dict[str, Any], before: dict[str, Any]) -> None:
    """Give a dictionary the content that it had, without touching what is the same."""
    for name in [name for name in held if name not in before]:
        del held[name]
    for name, value in before.items():
        if held.get(name, before) is not value:
            held[name] = value


def _paths_in_norms(tree: objects.Tree) -> set[str]:
    """Return the paths of the buffers of norms."""
    return {
        f"{path}.{name}" if path else name
        for path, part in tree.modules
        if isinstance(part, torch.nn.modules.batchnorm._NormBase)
        for name in objects.attributes(part)["_buffers"]
    }


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
