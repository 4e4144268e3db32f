"""The kind of a root call, and the rule by which calls of a kind are shared out."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.nested import LIMIT, parts, tensors_in

_EXACT = frozenset(map(id, (type(None), bool, int, str, bytes)))
"""Identities of the types whose values may decide what a module does."""


@dataclass(frozen=True)
class Kind:
    """What calls have in common that are shared out by one rule. It is hashable.

    Attributes:
        arguments: structure of the arguments, without sizes.
        modes: which modules are in training mode or have hooks.
        gradients: whether autograd records the call.
    """

    arguments: tuple[Hashable, ...]
    modes: tuple[Hashable, ...]
    gradients: bool


@dataclass(frozen=True)
class Rule:
    """How the calls of a kind are shared out.

    Attributes:
        inputs: for each of ``leaves``, the dimension that counts samples, ``None`` if each rank
            gets the whole tensor.
        outputs: likewise for each tensor of the output; ``None`` if it is the same on all ranks.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]


@dataclass(frozen=True)
class Refusal:
    """Why calls of a kind are computed whole on every rank.

    Attributes:
        reason: one clause that names the module.
        is_lasting: whether the next call of this kind would be refused too; if not, it may be
            tested again.
    """

    reason: str
    is_lasting: bool = True


def leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors in the arguments of a call, each once, in the order of
    ``nested.tensors_in``."""
    return distinct_tensors((args, kwargs))


def distinct_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested containers, each once, in the order of ``nested.tensors_in``."""
    return list({id(tensor): tensor for tensor in tensors_in(value)}.values())


def kind_of(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """Return the kind of a call.

    Integers and strings among the arguments are part of it, because a module may do something else
    for each of them, and of floats the sign. A program that passes the number of its step makes as
    many kinds as steps, so the caller limits how many kinds of a module it tests.

    Args:
        module: which is called.
        args, kwargs: with which it is called.
    """
    return Kind(
        tuple(_describe_arguments((args, kwargs))), tuple(_modes(module)), torch.is_grad_enabled()
    )


def _describe_arguments(value: Any) -> list[Hashable]:
    """Describe every object in nested containers, in one order."""
    found: list[Hashable] = []
    numbers: dict[int, int] = {}
    pending = [value]
    room = LIMIT
    while pending:
        item = pending.pop()
        kind = type(item)
        if id(kind) in _EXACT:
            found.append((kind, item))
        elif kind is float:
            found.append((kind, item > 0, item < 0))
        elif id(item) in numbers:
            found.append(numbers[id(item)])
        else:
            numbers[id(item)] = len(numbers)
            if issubclass(kind, torch.Tensor):
                found.append(_describe_tensor(item))
                continue
            content = parts(item, kind, room)
            room -= len(content)
            pending += reversed(content)
            keys = tuple(map(_describe_key, dict.keys(item))) if issubclass(kind, dict) else ()
            found.append((kind, len(content), keys))
    return found


def _describe_tensor(tensor: torch.Tensor) -> Hashable:
    """Describe a tensor without its sizes; a dimension of size 1 may be broadcast."""
    is_one = tuple(size == 1 for size in tensor.shape) if not tensor.is_nested else ()
    return (
        *(type(tensor), tensor.dtype, tensor.device, tensor.layout, is_one),
        tensor.requires_grad,
    )


def _describe_key(key: Any) -> Hashable:
    kind: Any = type(key)
    return (kind, key) if id(kind) in _EXACT else kind


def _modes(root: Any) -> list[Hashable]:
    """Describe what may change in a module tree from call to call and decides what a call does."""
    found: list[Hashable] = []
    for module in objects.modules(root):
        held = objects.attributes(module)
        hooks = [len(held.get(name) or ()) for name in ("_forward_hooks", "_forward_pre_hooks")]
        found.append((objects.is_training(module), *hooks))
    return found
