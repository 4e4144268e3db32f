"""What the program's objects hold, read without a call of what the program has written.

A class may make of an attribute, of iteration or of equality what it likes: count, raise, compute.
None of that is meant for us. So classes and instances are read here through the descriptors of
Python's own types, and modules through the dictionaries in which ``torch.nn.Module`` keeps what is
registered. Where a program keeps its things elsewhere, they are not seen.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch.jit._script import OrderedDictWrapper

_type: dict[str, Any] = cast("dict[str, Any]", vars(type))

mro: Callable[[type], tuple[type, ...]] = _type["__mro__"].__get__
"""The order in which a class and its bases are searched."""

namespace: Callable[[type], types.MappingProxyType[str, Any]] = _type["__dict__"].__get__
"""What a class itself defines."""

qualified_name: Callable[[type], str] = _type["__qualname__"].__get__
"""The name of a class."""

flags: Callable[[type], int] = _type["__flags__"].__get__
"""The bits of a type (``Py_TPFLAGS`` in CPython's documentation)."""

_module_attributes: Callable[[Any], dict[str, Any]] = vars(torch.nn.Module)["__dict__"].__get__

_HEAPTYPE = 1 << 9
"""Of a type (``Py_TPFLAGS_HEAPTYPE``): it was made by a class statement, or could have been."""

_ABSENT = object()


def class_name(value: object) -> str:
    """The qualified name of the class of ``value``."""
    return qualified_name(type(value))


def inherited(owner: type, name: str, after: bool = False) -> Any:
    """What ``owner``, or else the first of its bases that has it, defines as ``name``; ``None``
    if none does.

    Args:
        owner: a class.
        name: of the attribute.
        after: leave ``owner`` itself out.
    """
    for base in mro(owner)[after:]:
        found = namespace(base).get(name, _ABSENT)
        if found is not _ABSENT:
            return found
    return None


def attributes(value: object) -> dict[str, Any]:
    """The instance dictionary; an empty one where there is none."""
    for base in mro(type(value)):
        descriptor = namespace(base).get("__dict__")
        if type(descriptor) is types.GetSetDescriptorType:
            found: dict[str, Any] = descriptor.__get__(value)
            return found
    return {}


def attribute(value: object, name: str, default: Any = None) -> Any:
    """What the instance keeps as ``name``, in its dictionary or in a slot."""
    found = attributes(value).get(name, _ABSENT)
    if found is not _ABSENT:
        return found
    slot = inherited(type(value), name)
    if type(slot) is types.MemberDescriptorType:
        try:
            return slot.__get__(value)
        except AttributeError:  # not set
            return default
    return default


def slots(owner: type) -> list[types.MemberDescriptorType]:
    """The descriptors of what instances keep in slots, and of a ``defaultdict``'s factory."""
    found: list[types.MemberDescriptorType] = []
    for base in mro(owner):
        if flags(base) & _HEAPTYPE or base is defaultdict:
            found += (
                value
                for value in namespace(base).values()
                if type(value) is types.MemberDescriptorType
            )
    return found


def param_groups(optimizer: Any) -> list[dict[str, Any]]:
    """Those that an optimizer keeps."""
    return list(attributes(optimizer).get("param_groups", ()))


# Modules


def is_training(module: Any) -> bool:
    """Whether a module is in training mode."""
    if issubclass(type(module), torch.jit.ScriptModule):
        return bool(module.training)  # in C++
    return _module_attributes(module).get("training") is True


def named_modules(root: Any) -> Iterator[tuple[str, Any]]:
    """``root`` and all modules below it, each once, with its path; in the order of
    ``torch.nn.Module.named_modules``."""
    seen: set[int] = set()
    left = [("", root)]
    while left:
        path, module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        left += [
            (f"{prefix}{name}", child)
            for name, child in reversed(_registered(module, "_modules"))
            if issubclass(type(child), torch.nn.Module)
        ]


def modules(root: Any) -> Iterator[Any]:
    """``named_modules`` without the paths."""
    return (module for _, module in named_modules(root))


def children(module: Any) -> list[Any]:
    """The modules right below, each once."""
    found = (child for _, child in _registered(module, "_modules") if child is not None)
    return list({id(child): child for child in found}.values())


def named_parameters(root: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All parameters, each once, with their paths."""
    return _named_tensors(root, "_parameters")


def parameters(root: Any) -> Iterator[torch.nn.Parameter]:
    """``named_parameters`` without the paths."""
    return (parameter for _, parameter in _named_tensors(root, "_parameters"))


def named_buffers(root: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """All buffers, each once, with their paths."""
    return _named_tensors(root, "_buffers")


def buffers(root: Any) -> Iterator[torch.Tensor]:
    """``named_buffers`` without the paths."""
    return (buffer for _, buffer in _named_tensors(root, "_buffers"))


def _named_tensors(root: Any, kind: str) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in named_modules(root):
        prefix = f"{path}." if path else ""
        for name, tensor in _registered(module, kind):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}{name}", tensor


def _registered(module: Any, kind: str) -> list[tuple[str, Any]]:
    held: Any = _module_attributes(module).get(kind)
    if issubclass(type(held), dict):
        return list(dict.items(held))
    if issubclass(type(held), OrderedDictWrapper):  # of a script module
        return list(held.items())
    return []
