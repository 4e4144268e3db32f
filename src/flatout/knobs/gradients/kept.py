"""Keep the saved tensors of a deferred backward call unchanged.

Autograd counts the writes to a tensor, and raises an error for one that was written after it was
saved. A deferred call must not fail in this way. Moreover, autograd does not count some writes:
running statistics of a batch norm, ``parameter.data``, memory shared with NumPy or another process.
So the tensors that a deferred call will read are taken out of the graph, and those that anything
else refers to are copied. Most of them, the activations, need no copy.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from flatout.intercept import graph

_SECOND_TIME = (
    "Trying to backward through the graph a second time (or directly access saved tensors after "
    "they have already been freed). Saved intermediate values of the graph are freed when you call "
    ".backward() or autograd.grad(). Specify retain_graph=True if you need to backward through the "
    "graph a second time or if you need to access saved tensors after calling backward."
)
"""Torch's message (``ERR_BACKWARD_TWICE`` in ``torch/csrc/autograd/saved_variable.cpp``)."""

_ALIGNMENT = 64
"""Copies keep a tensor's address modulo this many bytes, because the rounding of matmuls and sums
may depend on it."""


def is_of_program(node: Any) -> bool:
    """Whether a node of the autograd graph is an ``autograd.Function`` of the program."""
    forward = getattr(type(node), "_forward_cls", None)
    is_ours = getattr(forward, "__module__", "").startswith("flatout.")
    return isinstance(node, BackwardCFunction) and not is_ours


def is_known(node: Any) -> bool:
    """Whether a node reads only saved tensors that can be accessed from Python.

    This holds for torch's generated formulas and for flatout's own nodes.
    """
    if isinstance(node, BackwardCFunction):
        return not is_of_program(node)
    return graph.leaf_of(node) is not None or _is_generated(type(node).__name__)


@functools.cache
def _is_generated(name: str) -> bool:
    return bool(re.fullmatch(r"\w+Backward\d+", name)) and hasattr(torch._C._functions, name)


class SavedTensors:
    """The saved tensors of a graph, which only a deferred backward call can read."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._is_readable = False

    @staticmethod
    def are_readable(node: Any) -> bool:
        """Whether a node's saved tensors have neither been freed nor written since."""
        try:
            for _ in _saved(node):
                pass
        except RuntimeError:
            return False
        return True

    def take(self, deferred: Iterable[Any], others: Iterable[Any]) -> bool:
        """Take the saved tensors of ``deferred`` nodes, and free those of ``others``.

        Torch frees all of them after backward without ``retain_graph``. Always returns ``True``.

        Raises:
            RuntimeError: the program has hooks on a saved tensor.
        """
        for node in others:
            if is_known(node) and self.are_readable(node):
                self._take_from(node)
        self._tensors.clear()
        for node in deferred:
            self._take_from(node)
        copy_where_shared(self._tensors)
        return True

    def release(self) -> None:
        """Free the tensors; reading them is then an error, as after any backward call."""
        self._tensors.clear()

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """A context in which the deferred call is computed and may read the tensors."""
        self._is_readable = True
        try:
            yield
        finally:
            self._is_readable = False

    def _take_from(self, node: Any) -> None:
        for handle in [handle for handle, _ in _saved(node)]:
            handle.register_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _unpack(self, index: int) -> torch.Tensor:
        if not (self._is_readable and self._tensors):
            raise RuntimeError(_SECOND_TIME)
        return self._tensors[index]


def _saved(node: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """The saved tensors of a node, each with torch's handle of it.

    Raises:
        RuntimeError: a tensor was written since it was saved, or has been freed.
    """
    if isinstance(node, BackwardCFunction):
        pairs = [(node._raw_saved_tensors, node.saved_tensors)]
    else:
        kind: Any = type(node)
        pairs = [
            (getattr(node, f"_raw_saved_{name}"), getattr(node, f"_saved_{name}"))
            for name in _names(kind)
        ]
    for handles, values in pairs:
        if isinstance(values, torch.Tensor):
            yield handles, values
        elif values:
            for handle, value in zip(handles, values, strict=True):
                if value is not None:
                    yield handle, value


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """The names of the tensors that a type of node saves."""
    prefix = "_raw_saved_"
    return tuple(name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix))


def copy_where_shared(tensors: list[torch.Tensor]) -> None:
    """Replace tensors by copies, in place, if anything else may write to their memory.

    That is memory to which anything but these tensors refers, or which torch did not allocate.
    """
    plain = [tensor for tensor in tensors if _is_plain(tensor)]
    uses = Counter(tensor.untyped_storage()._cdata for tensor in plain)
    shared = {
        storage._cdata
        for storage in (tensor.untyped_storage() for tensor in plain)
        if torch._C._storage_Use_Count(storage._cdata) > uses[storage._cdata] + 1  # ``storage``
        or not storage.resizable()
        or storage.is_shared()
    }
    copies: dict[Any, torch.Tensor] = {}
    for index, tensor in enumerate(tensors):
        if not _is_plain(tensor):
            tensors[index] = tensor.clone()
        elif (address := tensor.untyped_storage()._cdata) in shared:
            layout = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
            if (address, layout) not in copies:
                copies[address, layout] = _copy(tensor)
            tensors[index] = copies[address, layout]


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor; the copy has the same strides and the same address modulo ``_ALIGNMENT``."""
    if not tensor.numel():
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in pairs)
    size = tensor.element_size()
    memory = tensor.new_empty(span + _ALIGNMENT // size)
    shift = (tensor.data_ptr() - memory.data_ptr()) % _ALIGNMENT // size
    memory[shift : shift + span].copy_(tensor.as_strided((span,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), shift)
