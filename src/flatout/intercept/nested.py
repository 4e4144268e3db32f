"""Walking over the tensors in nested containers.

A program may pass any structure: trees whose nodes refer to their parents, dictionaries that
contain themselves, structures with so many shared parts that walking along all paths would never
end, and containers that count reads or raise. So a walk visits each container once, at any depth,
visits ``LIMIT`` objects at most, and calls no code of the program: builtin containers and their
subclasses are read by the methods of the builtin class, all others by ``objects``.

Containers are tuples, lists, dicts, ``UserDict``, ``UserList`` and dataclasses, with all their
subclasses, among them the batches and outputs of Hugging Face. Other mappings are not treated as
containers, since reading them calls code of the program; neither are modules and members of
enumerations.
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
"""The largest number of objects that a walk visits, which takes some tenths of a second. Further
objects are ignored."""

_LEAF_TYPE_IDS = frozenset(map(id, (type(None), bool, int, float, complex, str, bytes)))
"""The ids of common leaf types. Ids are compared, since hashing a type could call a metaclass's
``__hash__``."""

_BASETYPE = 1 << 10
"""The flag ``Py_TPFLAGS_BASETYPE`` of a type that can have subclasses."""

_ABSENT = object()


def tensors_in(value: Any, containers: list[Any] | None = None) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested containers, in their order.

    A tensor that occurs several times in one container is yielded several times. A container that
    occurs several times is visited once.

    Args:
        value: a container, a tensor or any other object.
        containers: a list to which the visited containers are appended; ``None``: they are not
            needed.
    """
    pending = [value]
    room = LIMIT
    seen: dict[int, Any] = {}
    while pending:
        item = pending.pop()
        kind = type(item)
        if id(kind) in _LEAF_TYPE_IDS:
            continue
        if issubclass(kind, torch.Tensor):
            yield item
        elif id(item) not in seen:
            seen[id(item)] = item  # kept alive, so that no other object gets the same id
            content = parts(item, kind, room)
            room -= len(content)
            pending += reversed(content)
            if content and containers is not None:
                containers.append(item)


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to every tensor in it, once for each tensor.

    Containers in which a tensor changes are copied, others are not. Objects that were shared are
    shared in the copies too. A container that cannot be copied without calling code of the program
    is left unchanged.
    """
    if issubclass(type(value), torch.Tensor):
        return function(value)
    containers: dict[int, tuple[Any, list[Any]]] = {}
    held_by: dict[int, list[int]] = {}
    results: dict[int, torch.Tensor] = {}
    replaced: dict[int, Any] = {}
    pending = [value]
    room = LIMIT
    while pending:
        item = pending.pop()
        content = parts(item, type(item), room)
        room -= len(content)
        containers[id(item)] = item, content
        for part in content:
            kind = type(part)
            if id(kind) in _LEAF_TYPE_IDS:
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
                pending.append(part)
    _copy_holders(containers, held_by, replaced)
    return replaced.get(id(value), value)


def _copy_holders(
    containers: dict[int, tuple[Any, list[Any]]],
    held_by: dict[int, list[int]],
    replaced: dict[int, Any],
) -> None:
    """Add to ``replaced`` a copy of each container that holds something replaced, at any depth."""
    changed: dict[int, Any] = {}
    pending = list(replaced)
    while pending:
        for holder in held_by.get(pending.pop(), ()):
            if holder not in changed:
                changed[holder] = containers[holder][0]
                pending.append(holder)
    tuples = {identity for identity, held in changed.items() if issubclass(type(held), tuple)}
    for identity, container in changed.items():
        if identity not in tuples:
            empty = _empty(container)
            if empty is not None:
                replaced[identity] = empty
    begun: set[int] = set()
    for identity in tuples:  # inner tuples come first, because a tuple is created with its content
        pending = [identity]
        while pending:
            begun.add(pending[-1])
            inside = map(id, containers[pending[-1]][1])
            inner = [part for part in inside if part in tuples and part not in begun]
            if inner:
                pending += inner
            else:
                done = pending.pop()
                replaced.setdefault(done, _new_tuple(changed[done], replaced))
    for identity, container in changed.items():
        if identity in replaced:
            _fill(replaced[identity], container, replaced)


def parts(container: Any, kind: type, room: int) -> list[Any]:
    """Return the content of a container, at most ``room`` objects; an empty list for other
    objects.

    Args:
        container: any object.
        kind: its type.
        room: greatest number of objects.
    """
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
    """Return a new, empty object of a container's class; ``None`` if none can be created.

    Args:
        container: a container that is no tuple.
    """
    kind = type(container)
    bases = (OrderedDict, defaultdict, dict, list, object)
    base: Any = next(base for base in bases if issubclass(kind, base))
    try:
        return base.__new__(kind)
    except TypeError:  # the class also derives from another type that is written in C
        return None


def _new_tuple(container: Any, replaced: dict[int, Any]) -> Any:
    """Return a copy of a tuple with objects replaced, or the tuple itself if it cannot be
    copied."""
    kind: Any = type(container)
    content = [replaced.get(id(part), part) for part in tuple.__iter__(container)]
    try:
        return tuple.__new__(kind, content)
    except TypeError:
        # Types without BASETYPE are struct sequences (such as the result of torch.max), which are
        # built from one list. Others cannot be copied.
        return container if objects.flags(kind) & _BASETYPE else kind(content)


def _fill(copy: Any, container: Any, replaced: dict[int, Any]) -> None:
    """Fill a copy with the content of the container, with objects replaced."""
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
