"""Tensors in nested containers.

What a program passes around may be anything: trees that know their parents, dictionaries that
contain themselves, structures shared so often that a walk along all paths would never end,
containers that count who reads them or raise. So a walk goes to each container once, to any depth,
looks at no more than ``LIMIT`` objects, and calls nothing that the program has written: builtin
containers, subclasses of them too, are read by the builtin's own methods, all others by
``intercept/objects.py``.

Containers are tuples, lists, dicts, ``UserDict``, ``UserList`` and dataclasses, with all their
subclasses: so the batches and outputs of Hugging Face are containers, a mapping of another kind,
which is read by calling it, is none. Nor are modules, and members of enumerations.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, UserDict, UserList, defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch

from flatout.intercept import objects

LIMIT = 100_000
"""Objects that a walk looks at. For so many it takes some tenths of a second at most; what lies
beyond is left as it is."""

_PLAIN = frozenset(map(id, (type(None), bool, int, float, complex, str, bytes)))
"""Types (by identity, as a metaclass may define a hash) of most objects that hold no others."""

_BASETYPE = 1 << 10
"""Of a type (``Py_TPFLAGS_BASETYPE``): it can have subclasses."""

_ABSENT = object()


def tensors_in(value: Any, containers: list[Any] | None = None) -> Iterator[torch.Tensor]:
    """The tensors in nested containers, in the order in which they lie.

    A tensor that lies in several places comes several times, a container's content once.

    Args:
        containers: where to add those that are looked into.
    """
    left = [value]
    room = LIMIT
    seen: dict[int, Any] = {}
    while left:
        item = left.pop()
        kind = type(item)
        if id(kind) in _PLAIN:
            continue
        if issubclass(kind, torch.Tensor):
            yield item
        elif id(item) not in seen:
            seen[id(item)] = item  # kept, so that its identity is not given to another object
            parts = _parts(item, kind, room)
            room -= len(parts)
            left += reversed(parts)
            if parts and containers is not None:
                containers.append(item)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor in it, once for each tensor.

    A container is copied only where a tensor in it changes; others are returned as such. In the
    copies, what was one object is one object again. A container that cannot be copied without a
    call of the program's own code is left as it is.
    """
    if issubclass(type(value), torch.Tensor):
        return function(value)
    containers: dict[int, tuple[Any, list[Any]]] = {}
    held_by: dict[int, list[int]] = {}
    results: dict[int, torch.Tensor] = {}
    replaced: dict[int, Any] = {}
    left = [value]
    room = LIMIT
    while left:
        item = left.pop()
        parts = _parts(item, type(item), room)
        room -= len(parts)
        containers[id(item)] = item, parts
        for part in parts:
            kind = type(part)
            if id(kind) in _PLAIN:
                continue
            identity = id(part)
            held_by.setdefault(identity, []).append(id(item))
            if issubclass(kind, torch.Tensor):
                if identity not in results:
                    results[identity] = result = function(part)
                    if result is not part:
                        replaced[identity] = result
            elif identity not in containers:
                containers[identity] = part, []
                left.append(part)
    _copy_holders(containers, held_by, replaced)
    return replaced.get(id(value), value)


def _copy_holders(
    containers: dict[int, tuple[Any, list[Any]]],
    held_by: dict[int, list[int]],
    replaced: dict[int, Any],
) -> None:
    """Add to ``replaced`` a copy of each container that holds something replaced, at any depth."""
    changed: dict[int, Any] = {}
    left = list(replaced)
    while left:
        for holder in held_by.get(left.pop(), ()):
            if holder not in changed:
                changed[holder] = containers[holder][0]
                left.append(holder)
    tuples = {identity for identity, held in changed.items() if issubclass(type(held), tuple)}
    for identity, container in changed.items():
        if identity not in tuples:
            empty = _empty(container)
            if empty is not None:
                replaced[identity] = empty
    begun: set[int] = set()
    for identity in tuples:  # made of what they hold, so that must be there before
        left = [identity]
        while left:
            begun.add(left[-1])
            inside = map(id, containers[left[-1]][1])
            inner = [part for part in inside if part in tuples and part not in begun]
            if inner:
                left += inner
            else:
                replaced.setdefault(left[-1], _new_tuple(changed[left.pop()], replaced))
    for identity, container in changed.items():
        if identity in replaced:
            _fill(replaced[identity], container, replaced)


def _parts(container: Any, kind: type, room: int) -> list[Any]:
    """What a container holds, at most ``room`` objects; nothing where it is no container."""
    if issubclass(type(kind), enum.EnumMeta):
        return []
    if issubclass(kind, dict):
        return list(islice(dict.values(container), room))
    if issubclass(kind, tuple):
        return list(islice(tuple.__iter__(container), room))
    if issubclass(kind, list):
        return list(islice(list.__iter__(container), room))
    if issubclass(kind, torch.nn.Module):
        return []
    if any(base is UserDict or base is UserList for base in objects.mro(kind)):
        data = objects.attribute(container, "data", _ABSENT)
        return [] if data is _ABSENT else [data][:room]
    fields = objects.inherited(kind, "__dataclass_fields__")
    if type(fields) is not dict:
        return []
    values = (objects.attribute(container, name, _ABSENT) for name in islice(fields, room))
    return [value for value in values if value is not _ABSENT]


def _empty(container: Any) -> Any:
    """A new object of the class of a container that is no tuple; ``None`` if none can be made."""
    kind = type(container)
    bases = (OrderedDict, defaultdict, dict, list, object)
    base: Any = next(base for base in bases if issubclass(kind, base))
    try:
        return base.__new__(kind)
    except TypeError:  # of another type that is written in C
        return None


def _new_tuple(container: Any, replaced: dict[int, Any]) -> Any:
    kind: Any = type(container)
    parts = [replaced.get(id(part), part) for part in tuple.__iter__(container)]
    try:
        return tuple.__new__(kind, parts)
    except TypeError:  # a struct sequence, such as what torch.max returns
        return container if objects.flags(kind) & _BASETYPE else kind(parts)


def _fill(copy: Any, container: Any, replaced: dict[int, Any]) -> None:
    """Give a copy what the container holds, replaced."""
    if copy is container:
        return
    if issubclass(type(container), OrderedDict):
        for key in OrderedDict.__iter__(container):
            part = dict.__getitem__(container, key)
            OrderedDict.__setitem__(copy, key, replaced.get(id(part), part))
    elif issubclass(type(container), dict):
        for key, part in dict.items(container):
            dict.__setitem__(copy, key, replaced.get(id(part), part))
    elif issubclass(type(container), list):
        list.extend(copy, [replaced.get(id(part), part) for part in list.__iter__(container)])
    if type(container) is dict or type(container) is list:
        return
    held = objects.attributes(copy)
    for name, part in objects.attributes(container).items():
        held[name] = replaced.get(id(part), part)
    for slot in objects.slots(type(container)):
        try:
            part = slot.__get__(container)
        except AttributeError:  # not set
            continue
        slot.__set__(copy, replaced.get(id(part), part))
