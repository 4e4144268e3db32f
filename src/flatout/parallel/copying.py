"""Copying a module so that it can be called without leaving a trace in the program.

``copy.deepcopy`` runs code of the program, follows references to a whole trainer with its data, and
refuses tensors that autograd has made. So a module is copied here as far as its own state reaches:
its submodules, tensors, builtin containers, generators of random numbers, and objects of classes
from the packages that the module's classes come from. Everything else is shared with the copy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pickle
import random
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.arrays import EXACT_TENSOR_TYPES

_SCALARS = (type(None), bool, int, float, complex, str, bytes)

_HEAPTYPE = 1 << 9
"""The flag ``Py_TPFLAGS_HEAPTYPE`` of a class that was made by a ``class`` statement."""

_REGISTRIES = ("_modules", "_parameters")
"""Names of a module's attributes that are read otherwise or hold what a call may not change."""


class CannotCopyError(Exception):
    """Raised with the type of an object that cannot be copied."""


class Copier:
    """Copies modules and what belongs to them.

    Args:
        root: the module to copy.
        weights: for the identity of each parameter, the tensor that takes its place.
        in_float64: whether other floating-point tensors become float64.
    """

    def __init__(self, root: Any, weights: dict[int, torch.Tensor], in_float64: bool) -> None:
        self._root = root
        self._in_float64 = in_float64
        self._copies: dict[int, Any] = dict(weights)
        self._originals: list[Any] = []
        self._generators: list[tuple[Any, Any]] = []
        self._modules = set(map(id, objects.modules(root)))
        self._packages = {_package(type(module)) for module in objects.modules(root)} - {"torch"}

    def copy_module(self) -> Any:
        """Return a copy of the root module.

        Raises:
            CannotCopyError: it holds a tensor of a type of its own.
        """
        return self.copy(self._root)

    def keep(self, value: Any) -> None:
        """Have an object stand for itself in copies."""
        self._copies[id(value)] = value

    def draws(self) -> bool:
        """Whether a copied generator has advanced."""
        return any(
            _generator_state(original) != _generator_state(copied)
            for original, copied in self._generators
        )

    def state(self, module: Any) -> list[tuple[str, Any]]:
        """Return the names and values of what calls may change in a copy: tensors other than
        registered parameters, numbers, strings, ``None`` and lengths of containers."""
        found: list[tuple[str, Any]] = []
        seen: set[int] = set()
        for path, part in objects.named_modules(module):
            prefix = f"{path}." if path else ""
            for name, value in list(objects.attributes(part).items()):
                if name == "_buffers":
                    found += ((f"{prefix}{key}", buffer) for key, buffer in value.items())
                elif name not in _REGISTRIES:
                    found += ((f"{prefix}{name}", item) for item in self._state_in(value, seen))
        return found

    def _state_in(self, value: Any, seen: set[int]) -> Iterator[Any]:
        pending = [value]
        while pending:
            item = pending.pop()
            kind = type(item)
            if kind in _SCALARS:
                yield item
            elif id(item) in seen or issubclass(kind, torch.nn.Module):
                continue
            elif issubclass(kind, torch.Tensor):
                seen.add(id(item))
                if kind is not torch.nn.Parameter:
                    yield item
            else:
                seen.add(id(item))
                content = self._content(item, kind)
                if content is not None:
                    yield len(content)
                    pending += content

    def _content(self, item: Any, kind: type) -> list[Any] | None:
        """Return what is in a container or an object of the module, ``None`` for other objects."""
        if issubclass(kind, dict):
            return list(dict.values(item))
        if issubclass(kind, (list, tuple, deque, set, frozenset)):
            return list(item)
        if kind is types.FunctionType:
            return _enclosed(item)
        if kind is functools.partial:
            return [item.func, *item.args, *item.keywords.values()]
        return list(objects.attributes(item).values()) if self._belongs(kind) else None

    def copy(self, value: Any) -> Any:
        """Return a copy of an object; the object itself if it is shared."""
        kind = type(value)
        if kind in _SCALARS:
            return value
        if id(value) in self._copies:
            return self._copies[id(value)]
        self._originals.append(value)  # kept, so that its identity is not given to another object
        copied = self._copy(value, kind)
        self._copies.setdefault(id(value), copied)
        return copied

    def _copy(self, value: Any, kind: Any) -> Any:
        if issubclass(kind, torch.Tensor):
            return self._copy_tensor(value)
        if issubclass(kind, tuple):
            return self._copy_tuple(value, kind)
        if kind in (set, frozenset):
            return kind(map(self.copy, value))
        if kind in (dict, OrderedDict, defaultdict, list, deque):
            return self._fill(value, self._remember(value, _empty(value)))
        if kind is types.FunctionType:
            return self._copy_function(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.copy(value.__self__))
        if kind is functools.partial:
            args, keywords = self.copy(value.args), self.copy(value.keywords)
            return functools.partial(self.copy(value.func), *args, **keywords)
        if issubclass(kind, _generator_types()):
            copied = copy.deepcopy(value) if kind is not torch.Generator else value.clone_state()
            self._generators.append((value, copied))
            return copied
        if issubclass(kind, torch.nn.Module) or self._belongs(kind) or self._wraps(value, kind):
            copied = self._remember(value, object.__new__(kind))
            held = {name: self.copy(part) for name, part in objects.attributes(value).items()}
            objects.attributes(copied).update(held)
            return copied
        return value

    def _belongs(self, kind: type) -> bool:
        """Whether objects of a class belong to the module: it is of the same package, keeps its
        state in a dictionary, and is made by ``object``."""
        return (
            bool(objects.flags(kind) & _HEAPTYPE)
            and not issubclass(kind, (type, BaseException))
            and _package(kind) in self._packages
            and objects.inherited(kind, "__new__") is object.__new__
            and not objects.slots(kind)
        )

    def _wraps(self, value: Any, kind: type) -> bool:
        """Whether an object is called in the place of a method of a module that is copied."""
        return (
            bool(objects.flags(kind) & _HEAPTYPE)
            and objects.inherited(kind, "__call__") is not None
            and objects.inherited(kind, "__new__") is object.__new__
            and any(
                type(part) is types.MethodType and id(part.__self__) in self._modules
                for part in objects.attributes(value).values()
            )
        )

    def _copy_function(self, function: Any) -> Any:
        """Copy a function if what it closes over is copied."""
        content = _enclosed(function)
        copied = list(map(self.copy, content))
        if all(map(_is_same, copied, content)) or len(content) < len(function.__closure__):
            return function
        made = types.FunctionType(
            *(function.__code__, function.__globals__, function.__name__, function.__defaults__),
            tuple(map(types.CellType, copied)),
        )
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        return made

    def _remember(self, value: Any, copied: Any) -> Any:
        """Note a copy before its content is copied, which may refer to it."""
        self._copies[id(value)] = copied
        return copied

    def _copy_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) not in EXACT_TENSOR_TYPES or tensor.layout is not torch.strided:
            raise CannotCopyError(type(tensor))
        copied = tensor.detach().clone()
        if self._in_float64 and copied.is_floating_point():
            copied = copied.double()
        if type(tensor) is torch.nn.Parameter:
            return torch.nn.Parameter(copied, tensor.requires_grad)
        return copied.requires_grad_(tensor.requires_grad)

    def _copy_tuple(self, value: Any, kind: Any) -> Any:
        content = list(map(self.copy, tuple.__iter__(value)))
        if all(map(_is_same, content, tuple.__iter__(value))):
            return value
        return tuple.__new__(kind, content)

    def _fill(self, value: Any, copied: Any) -> Any:
        if isinstance(value, dict):
            for key, part in value.items():
                copied[key] = self.copy(part)
        else:
            copied.extend(map(self.copy, value))
        return copied


def _is_same(one: Any, other: Any) -> bool:
    return one is other


def _enclosed(function: Any) -> list[Any]:
    """Return the values of the variables that a function closes over, as far as they are set."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):
            found.append(cell.cell_contents)
    return found


def _empty(value: Any) -> Any:
    """Return an empty container like another one."""
    if type(value) is defaultdict:
        return defaultdict(value.default_factory)
    if type(value) is deque:
        return deque(maxlen=value.maxlen)
    return type(value)()


def _package(kind: type) -> str:
    """Return the name of the outermost package or module that a class was made in."""
    module = objects.inherited(kind, "__module__")
    return module.partition(".")[0] if isinstance(module, str) else ""


def _generator_types() -> tuple[type, ...]:
    numpy: Any = sys.modules.get("numpy.random")
    found: tuple[type, ...] = (random.Random, torch.Generator)
    return found if numpy is None else (*found, numpy.Generator, numpy.RandomState)


def _generator_state(generator: Any) -> Any:
    """Return what a generator draws next, to be compared."""
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, random.Random):
        return generator.getstate()
    bits = generator.bit_generator if hasattr(generator, "bit_generator") else generator
    return pickle.dumps(bits.state if hasattr(bits, "state") else bits.get_state())
