"""The kind of a root call, and the rule by which calls of a kind are shared out."""

from __future__ import annotations

import enum
import types
from collections import UserDict, UserList
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.nested import LIMIT, parts, tensors_in
from flatout.parallel.placement import Placement

_EXACT = frozenset(map(id, (type(None), bool, int, str, bytes)))
"""Identities of the types whose values may decide what a module does."""

_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, type, range, slice),
    *(types.FunctionType, types.BuiltinFunctionType, types.EllipsisType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types of objects that hold no tensors and do not change."""


_SHOWN = (range, torch.dtype, torch.device, torch.layout, torch.memory_format)
"""Types of which ``repr`` shows the value."""

SCALARS = frozenset((type(None), bool, int, float, complex, str, bytes))
"""Types of values that decide what a module does and hold nothing else."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Names of the dictionaries in which a module registers hooks."""

GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
"""Names of the dictionaries of the hooks of all modules."""


@dataclass(frozen=True)
class Kind:
    """What calls have in common that are shared out by one rule. It is hashable.

    Attributes:
        arguments: structure of the arguments, without sizes.
        modes: which modules are in training mode, and the hooks of all.
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
        placements: where the samples are in each draw of random numbers.
        output_dims: for each tensor of the output, its number of dimensions; empty: not known.
        sums: where the samples are in what operators add up, if sums are taken over all ranks.
    """

    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]
    placements: tuple[Placement, ...] = ()
    output_dims: tuple[int, ...] = field(default=(), compare=False)
    sums: tuple[Placement, ...] = ()


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


def tensors_of_output(value: Any) -> list[torch.Tensor]:
    """Return the tensors that a module has returned, each once, also those in caches of keys and
    values."""
    return [item for item, _ in _visit(value, True) if isinstance(item, torch.Tensor)]


def caches_in(value: Any) -> list[Any]:
    """Return the caches of keys and values of Hugging Face in what a module has returned, and the
    layers of these caches."""
    return [item for item, _ in _visit(value, True) if _is_cache(type(item))]


def _is_cache(kind: Any) -> bool:
    """Whether objects of a class are caches of Hugging Face or their layers: they have all of their
    state in attributes."""
    defined_in = (objects.namespace(base).get("__module__") for base in objects.mro(kind))
    return "transformers.cache_utils" in defined_in


def kind_of(tree: objects.Tree, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Kind:
    """Return the kind of a call.

    Integers and strings among the arguments are part of it, because a module may do something else
    for each of them, and of floats the sign. A program that passes the number of its step makes as
    many kinds as steps, so the caller limits how many kinds of a module it tests.

    Args:
        tree: of the module which is called.
        args, kwargs: with which it is called.
    """
    return Kind(
        tuple(_describe_arguments((args, kwargs))), tuple(_modes(tree)), torch.is_grad_enabled()
    )


def structure_of(value: Any, is_output: bool = False) -> list[Hashable]:
    """Describe nested containers and what is in them, but for the tensors, of which only the places
    count.

    Args:
        value: to be described.
        is_output: whether a module has returned it, so that caches are containers.
    """
    return [
        "tensor" if isinstance(item, torch.Tensor) else _describe(item, content, exact=True)
        for item, content in _visit(value, is_output)
    ]


def has_numbers(structure: Iterable[Hashable]) -> bool:
    """Whether there are numbers or texts in what ``structure_of`` describes."""
    return any(
        type(part) is tuple and part[0] in (bool, int, float, complex, str, bytes)
        for part in structure
    )


def find_opaque(value: Any, is_output: bool = False) -> type | None:
    """Return the type of an object in nested containers that may hold tensors or change, and into
    which nobody can look; ``None`` if there is none.

    Args:
        value: to be looked into.
        is_output: whether a module has returned it, so that caches are containers.
    """
    for item, content in _visit(value, is_output):
        kind = type(item)
        if (
            not content
            and not issubclass(kind, (torch.Tensor, *_IMMUTABLE))
            and not issubclass(type(kind), enum.EnumMeta)
            and not is_container(item)
        ):
            return kind
    return None


def is_container(value: Any) -> bool:
    """Whether ``nested`` can look into an object."""
    kind = type(value)
    return issubclass(kind, (dict, list, tuple, UserDict, UserList)) or (
        type(objects.inherited(kind, "__dataclass_fields__")) is dict
    )


def _describe_arguments(value: Any) -> list[Hashable]:
    """Describe every object in nested containers, in one order."""
    return [
        _describe_tensor(item) if isinstance(item, torch.Tensor) else _describe(item, content)
        for item, content in _visit(value)
    ]


def _visit(value: Any, opens_caches: bool = False) -> Iterator[tuple[Any, list[Any]]]:
    """Yield the objects in nested containers in one order, each with its content; in the place of
    an object that was there before, its number."""
    numbers: dict[int, int] = {}
    pending = [value]
    room = LIMIT
    while pending:
        item = pending.pop()
        kind = type(item)
        if id(kind) in _EXACT or kind is float or kind is complex:
            yield item, []
        elif id(item) in numbers:
            yield ("again", numbers[id(item)]), []
        else:
            numbers[id(item)] = len(numbers)
            content = [] if issubclass(kind, torch.Tensor) else parts(item, kind, room)
            if opens_caches and not content and _is_cache(kind):
                content = list(objects.attributes(item).values())[:room]
            room -= len(content)
            pending += reversed(content)
            yield item, content


def _describe(item: Any, content: list[Any], exact: bool = False) -> Hashable:
    """Describe an object that is no tensor; of a float only the sign, unless ``exact``."""
    kind: Any = type(item)
    if id(kind) in _EXACT:
        return kind, item
    if kind is float:
        return kind, *((repr(item),) if exact else (item > 0, item < 0))
    if kind is complex and exact:
        return kind, repr(item)
    if issubclass(type(kind), enum.EnumMeta):
        return kind, str(objects.attribute(item, "_name_")), repr(_plain_value(item))
    if kind in _SHOWN:
        return kind, repr(item)
    keys = tuple(map(_describe_key, dict.keys(item))) if issubclass(kind, dict) else ()
    return kind, len(content), keys


def _plain_value(member: Any) -> Any:
    """Return the value of a member of an enumeration, ``None`` if it has a type of its own."""
    value = objects.attribute(member, "_value_")
    return value if type(value) in SCALARS else None


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


def _modes(tree: objects.Tree) -> list[Hashable]:
    """Describe what may change in a module tree from call to call and decides what a call does."""
    found: list[Hashable] = []
    for (_, module), held in zip(tree.modules, tree.held, strict=True):
        found.append((objects.is_training(module), *(_Hooks(held.get(name)) for name in HOOKS)))
    return [
        *found,
        *(_Hooks(getattr(torch.nn.modules.module, name, None)) for name in GLOBAL_HOOKS),
    ]


class _Hooks(tuple[Hashable, ...]):
    """The keys under which hooks are registered. They may differ between the ranks, so ``repr``
    shows only their number."""

    __slots__ = ()

    def __new__(cls, registry: Any) -> _Hooks:
        """Return the keys of a dictionary of hooks."""
        return super().__new__(cls, dict.keys(registry) if registry else ())

    def __repr__(self) -> str:
        return str(len(self))


def scalars_of(tree: objects.Tree) -> list[dict[str, Any]]:
    """Return the numbers, texts and ``None`` among the attributes of each module of a tree, which
    may decide what a call does. The training mode is left out."""
    return [
        {
            name: value
            for name, value in held.items()
            if type(value) in SCALARS and name != "training"
        }
        for held in tree.held
    ]
