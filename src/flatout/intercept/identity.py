"""Weak dictionaries and sets that compare objects by identity.

A ``weakref.WeakKeyDictionary`` calls ``__eq__`` and ``__hash__`` of its keys, which the program may
define: two different optimizers may compare equal, and a module may not be hashable.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class WeakIdentityDict(Generic[K, V]):
    """A dictionary that compares keys by identity, and drops an entry when its key is freed.

    A value must not refer to its key.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[K], V]] = {}

    def __setitem__(self, key: K, value: V) -> None:
        identity, entries = id(key), self._entries
        known = entries.get(identity)
        reference = known[0] if known is not None and known[0]() is key else None
        if reference is None:

            def forget(gone: weakref.ref[K]) -> None:
                entry = entries.get(identity)
                if entry is not None and entry[0] is gone:
                    del entries[identity]

            reference = weakref.ref(key, forget)
        entries[identity] = reference, value

    def get(self, key: K, default: V | None = None) -> V | None:
        """Return the value of ``key``, or ``default`` if there is none."""
        entry = self._entries.get(id(key))
        return entry[1] if entry is not None and entry[0]() is key else default

    def __getitem__(self, key: K) -> V:
        entry = self._entries.get(id(key))
        if entry is None or entry[0]() is not key:
            raise KeyError(key)
        return entry[1]

    def __contains__(self, key: K) -> bool:
        entry = self._entries.get(id(key))
        return entry is not None and entry[0]() is key

    def setdefault(self, key: K, default: V) -> V:
        """Return the value of ``key``; set it to ``default`` first if there is none."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: K, default: V | None = None) -> V | None:
        """Remove ``key`` and return its value, or ``default`` if there is none."""
        if key not in self:
            return default
        return self._entries.pop(id(key))[1]

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        del self._entries[id(key)]

    def items(self) -> list[tuple[K, V]]:
        """Return the living keys with their values, in the order in which they were added."""
        living = [(reference(), value) for reference, value in list(self._entries.values())]
        return [(key, value) for key, value in living if key is not None]

    def keys(self) -> list[K]:
        """Return the living keys."""
        return [key for key, _ in self.items()]

    def values(self) -> list[V]:
        """Return the values of the living keys."""
        return [value for _, value in self.items()]

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def clear(self) -> None:
        """Remove all entries."""
        self._entries.clear()


class WeakIdentitySet(Generic[K]):
    """A set that compares members by identity, and drops a member when it is freed."""

    def __init__(self, members: Iterable[K] = ()) -> None:
        self._members: WeakIdentityDict[K, None] = WeakIdentityDict()
        for member in members:
            self.add(member)

    def add(self, member: K) -> None:
        """Add an object, unless it is a member."""
        self._members.setdefault(member, None)

    def discard(self, member: K) -> None:
        """Remove an object, if it is a member."""
        self._members.pop(member)

    def __contains__(self, member: K) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[K]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
