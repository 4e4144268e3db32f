"""Reading the program's objects without calling code of the program.

A class of the program may define attribute access, iteration or equality so that it counts, raises
or computes. So classes and instances are read here by the descriptors of CPython's types, and
modules by the dictionaries in which ``torch.nn.Module`` registers parameters, buffers and
submodules. Objects that a program stores elsewhere are not found.
"""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch.jit._script import OrderedDictWrapper

_type: dict[str, Any] = cast("dict[str, Any]", vars(type))

mro: Callable[[type], tuple[type, ...]] = _type["__mro__"].__get__
"""Returns the method resolution order of a class."""

namespace: Callable[[type], types.MappingProxyType[str, Any]] = _type["__dict__"].__get__
"""Returns the namespace of a class, without that of its bases."""

qualified_name: Callable[[type], str] = _type["__qualname__"].__get__
"""Returns the qualified name of a class."""

flags: Callable[[type], int] = _type["__flags__"].__get__
"""Returns the flags of a type (``Py_TPFLAGS`` in the documentation of CPython)."""

_module_attributes: Callable[[Any], dict[str, Any]] = vars(torch.nn.Module)["__dict__"].__get__

_HEAPTYPE = 1 << 9
"""The flag ``Py_TPFLAGS_HEAPTYPE``, which a type has that was created at run time."""

_ABSENT = object()


def class_name(value: object) -> str:
    """Return the qualified name of the class of ``value``."""
    return qualified_name(type(value))


def inherited(owner: type, name: str, after: bool = False) -> Any:
    """Return the attribute ``name`` of the first class in the resolution order that defines it.

    Args:
        owner: a class.
        name: the name of the attribute.
        after: whether to skip ``owner`` itself.

    Returns:
        The attribute without binding; ``None`` if no class defines it.
    """
    for base in mro(owner)[after:]:
        found = namespace(base).get(name, _ABSENT)
        if found is not _ABSENT:
            return found
    return None


def attributes(value: object) -> dict[str, Any]:
    """Return the instance dictionary of an object, or an empty dictionary if it has none."""
    for base in mro(type(value)):
        descriptor = namespace(base).get("__dict__")
        if type(descriptor) is types.GetSetDescriptorType:
            found: dict[str, Any] = descriptor.__get__(value)
            return found
    return {}


def attribute(value: object, name: str, default: Any = None) -> Any:
    """Return the attribute ``name`` from the instance dictionary or a slot, else ``default``."""
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
    """Return the descriptors of the slots of a class and its bases, and of the factory of a
    ``defaultdict``."""
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
    """Return the parameter groups of an optimizer."""
    return list(attributes(optimizer).get("param_groups", ()))


# Modules


def is_training(module: Any) -> bool:
    """Whether a module is in training mode."""
    if issubclass(type(module), torch.jit.ScriptModule):
        return bool(module.training)  # stored in C++
    return _module_attributes(module).get("training") is True


def named_modules(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``root`` and all its descendants with their paths, each once, in the order of
    ``torch.nn.Module.named_modules``."""
    seen: set[int] = set()
    pending = [("", root)]
    while pending:
        path, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = f"{path}." if path else ""
        pending += [
            (f"{prefix}{name}", child)
            for name, child in reversed(_registered(module, "_modules"))
            if issubclass(type(child), torch.nn.Module)
        ]


def modules(root: Any) -> Iterator[Any]:
    """Yield the modules of ``named_modules``."""
    return (module for _, module in named_modules(root))


def children(module: Any) -> list[Any]:
    """Return the direct submodules, each once."""
    found = (child for _, child in _registered(module, "_modules") if child is not None)
    return list({id(child): child for child in found}.values())


def named_parameters(root: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield all parameters, each once, with their paths."""
    return _named_tensors(root, "_parameters")


def parameters(root: Any) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of ``named_parameters``."""
    return (parameter for _, parameter in _named_tensors(root, "_parameters"))


def named_buffers(root: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all buffers, each once, with their paths."""
    return _named_tensors(root, "_buffers")


def buffers(root: Any) -> Iterator[torch.Tensor]:
    """Yield the buffers of ``named_buffers``."""
    return (buffer for _, buffer in _named_tensors(root, "_buffers"))


class Tree:
    """The modules of a tree with what they hold, as they were when this was made.

    Args:
        root: the module at the root.

    Attributes:
        modules: paths and modules, as ``named_modules`` yields them.
        held: the instance dictionary of each module.
    """

    def __init__(self, root: Any) -> None:
        self.modules = list(named_modules(root))
        self.held = [attributes(module) for _, module in self.modules]

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return what ``parameters`` yields."""
        return [parameter for _, parameter in _tensors_in(self.modules, "_parameters")]

    def named_buffers(self) -> list[tuple[str, torch.Tensor]]:
        """Return what ``named_buffers`` yields."""
        return list(_tensors_in(self.modules, "_buffers"))


def state_tensors(roots: Iterable[Any], optimizers: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield what training changes, some of it more than once: the parameters and buffers of root
    modules, what optimizers update, and the tensors in their states."""
    for root in roots:
        yield from parameters(root)
        yield from buffers(root)
    for optimizer in optimizers:
        for group in param_groups(optimizer):
            yield from group["params"]
        for state in attributes(optimizer).get("state", {}).values():
            values = state.values() if isinstance(state, dict) else ()
            yield from (value for value in values if issubclass(type(value), torch.Tensor))


def _named_tensors(root: Any, kind: str) -> Iterator[tuple[str, Any]]:
    return _tensors_in(named_modules(root), kind)


def _tensors_in(named: Iterable[tuple[str, Any]], kind: str) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for path, module in named:
        prefix = f"{path}." if path else ""
        for name, tensor in _registered(module, kind):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{prefix}{name}", tensor


def _registered(module: Any, kind: str) -> list[tuple[str, Any]]:
    held: Any = _module_attributes(module).get(kind)
    if issubclass(type(held), dict):
        return list(dict.items(held))
    if issubclass(type(held), OrderedDictWrapper):  # the module is a script module
        return list(held.items())
    return []
