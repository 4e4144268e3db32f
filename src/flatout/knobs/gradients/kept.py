"""What a backward call reads, kept as it is.

Autograd counts how often a tensor was written, and refuses to read one that was written since it
was saved. But it does not see what goes past its counters: running statistics of a batch norm,
``parameter.data``, memory shared with NumPy or another process. And what has to be computed later
must not fail there either. So what is saved for a call that waits is taken out of the graph's
hands, and copied where anybody else could write to it. Nobody else has most of it, the activations.
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
"""In torch's own words (``ERR_BACKWARD_TWICE`` in ``torch/csrc/autograd/saved_variable.cpp``)."""

_ALIGNMENT = 64
"""Bytes. Where memory begins within them, products and sums may depend on in their last bits."""


def is_of_program(node: Any) -> bool:
    """Whether a node of a graph calls Python that is not ours."""
    forward = getattr(type(node), "_forward_cls", None)
    is_flatout_failure = getattr(forward, "__module__", "").startswith("flatout.")
    return isinstance(node, BackwardCFunction) and not is_flatout_failure


def is_known(node: Any) -> bool:
    """Whether a node reads its saved tensors only, and all of these are to be seen: it is one of
    torch's generated formulas, or one of ours."""
    if isinstance(node, BackwardCFunction):
        return not is_of_program(node)
    return graph.leaf_of(node) is not None or _is_generated(type(node).__name__)


@functools.cache
def _is_generated(name: str) -> bool:
    return bool(re.fullmatch(r"\w+Backward\d+", name)) and hasattr(torch._C._functions, name)


class Kept:
    """The saved tensors of a graph that one more call will read, and nobody else."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._is_readable = False

    @staticmethod
    def can_be_read(node: Any) -> bool:
        """Whether what a node has saved is there, and was not written since."""
        try:
            for _ in _saved(node):
                pass
        except RuntimeError:
            return False
        return True

    def keep(self, late: Iterable[Any], others: Iterable[Any]) -> bool:
        """Keep what ``late`` nodes have saved, and let go what ``others`` have, as torch does
        with all of them after backward.

        Raises:
            RuntimeError: the program has hooks on what a node has saved.
        """
        for node in others:
            if is_known(node) and self.can_be_read(node):
                self._take(node)
        self._tensors.clear()
        for node in late:
            self._take(node)
        copy_where_shared(self._tensors)
        return True

    def release(self) -> None:
        """Let go all of it; to read it then is an error, as after any backward call."""
        self._tensors.clear()

    @contextlib.contextmanager
    def readable(self) -> Iterator[None]:
        """While what has waited is computed."""
        self._is_readable = True
        try:
            yield
        finally:
            self._is_readable = False

    def _take(self, node: Any) -> None:
        for slot in [slot for slot, _ in _saved(node)]:
            slot.register_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _unpack(self, place: int) -> torch.Tensor:
        if not (self._is_readable and self._tensors):
            raise RuntimeError(_SECOND_TIME)
        return self._tensors[place]


def _saved(node: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """What a node has saved: torch's handles, and the tensors.

    Raises:
        RuntimeError: one was written since, or is not there any more.
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
    """Of the tensors that a kind of node saves."""
    prefix = "_raw_saved_"
    return tuple(name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix))


def copy_where_shared(tensors: list[torch.Tensor]) -> None:
    """Put copies in the place of those whose memory anything but these tensors refers to, or that
    torch did not allocate."""
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
    for place, tensor in enumerate(tensors):
        if not _is_plain(tensor):
            tensors[place] = tensor.clone()
        elif (at := tensor.untyped_storage()._cdata) in shared:
            layout = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype
            if (at, layout) not in copies:
                copies[at, layout] = _copy(tensor)
            tensors[place] = copies[at, layout]


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_nested or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """One with the same strides that begins at the same place within ``_ALIGNMENT``."""
    if not tensor.numel():
        return tensor
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in pairs)
    size = tensor.element_size()
    memory = tensor.new_empty(span + _ALIGNMENT // size)
    shift = (tensor.data_ptr() - memory.data_ptr()) % _ALIGNMENT // size
    memory[shift : shift + span].copy_(tensor.as_strided((span,), (1,)))
    return memory.as_strided(tensor.shape, tensor.stride(), shift)
