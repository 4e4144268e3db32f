"""Other kernels for operators of torch, compiled ones among them."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import forward_ad

from flatout import kernels
from flatout.agent.arrays import PLAIN
from flatout.knobs import RefusedError, Undo


def compiled(name: str, stays: str) -> ctypes.CDLL:
    """The library of a kernel that is to stand in for an operator.

    Args:
        name: of the kernel.
        stays: what is used without it, in words.

    Raises:
        RefusedError: it cannot be had, or this torch cannot hand its own kernel over.
    """
    try:
        library = kernels.load(name)
    except kernels.KernelError as error:
        raise RefusedError(f"{stays} stay: {error}") from error
    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(f"{stays} stay: torch {torch.__version__} cannot hand its kernel over")
    return library


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are dense tensors on the CPU of no other class, outside of what transforms."""
    return (
        all(
            type(x) in PLAIN and x.is_cpu and x.layout is torch.strided and not x.is_nested
            for x in tensors
        )
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def replace(functions: Mapping[str, Callable[..., Any]], *keys: str) -> Undo:
    """Put functions behind operators; returns what puts torch's own kernels back.

    Args:
        functions: by the operator's name without ``aten::``; each is called with the set of
            dispatch keys, which torch's own kernel wants to have, and the operator's arguments.
        keys: the dispatch keys that they are for.
    """
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of every replaced kernel
        for name, function in functions.items():
            for key in keys:
                library.impl(name, function, key, with_keyset=True)
    destroy: Undo = library._destroy
    return destroy


def layer(functions: Mapping[str, Callable[..., Any]], key: str) -> Undo:
    """Put functions behind operators that other knobs may have replaced, or will; returns the undo.

    Args:
        functions: by the operator's name without ``aten::``; each is called with what lies below
            it, the set of dispatch keys, and the operator's arguments. What lies below is called
            with the last two.
        key: the dispatch key that they are for.
    """
    for name, function in functions.items():
        if (name, key) not in _layers:
            _layers[name, key] = Layers(name, key)
        _layers[name, key].functions.append(function)

    def undo() -> None:
        for name, function in functions.items():
            layers = _layers[name, key]
            layers.functions.remove(function)
            if not layers.functions:
                _layers.pop((name, key)).give_back()

    return undo


class Layers:
    """Functions behind one operator, one upon the other.

    Args:
        name: of the operator.
        key: the dispatch key.

    Attributes:
        functions: the topmost is the last one.
        give_back: puts torch's own kernel back.
    """

    def __init__(self, name: str, key: str) -> None:
        self.functions: list[Callable[..., Any]] = []
        self._own = torch.library.get_kernel(f"aten::{name}", key).call_boxed
        self.give_back = replace({name: self._call}, key)

    def _call(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        below: Callable[..., Any] = self._own
        for function in self.functions:
            below = functools.partial(function, below)
        return below(keyset, *args, **kwargs)


_layers: dict[tuple[str, str], Layers] = {}
