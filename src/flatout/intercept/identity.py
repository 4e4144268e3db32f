"""What is known of the program's objects, for as long as they live.

A ``weakref.WeakKeyDictionary`` asks ``__eq__`` and ``__hash__`` of its keys, which the program may
have written: of its optimizers two may say that they are equal, and its modules may have no hash.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class WeakIdentityDict(Generic[K, V]):
    """Something about each of some objects, for as long as they live.

    A value must not hold its key.
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
        """The value, ``default`` where nothing is known of ``key``."""
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
        """The value, which is ``default`` from now on where nothing was known of ``key``."""
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: K, default: V | None = None) -> V | None:
        """The value, taken out; ``default`` where there is none."""
        if key not in self:
            return default
        return self._entries.pop(id(key))[1]

    def __delitem__(self, key: K) -> None:
        if key not in self:
            raise KeyError(key)
        del self._entries[id(key)]

    def items(self) -> list[tuple[K, V]]:
        """The living objects with what is known of them, those first that have been known
        longest."""
        living = [(reference(), value) for reference, value in list(self._entries.values())]
        return [(key, value) for key, value in living if key is not None]

    def keys(self) -> list[K]:
        """The living objects."""
        return [key for key, _ in self.items()]

    def values(self) -> list[V]:
        """What is known of the living objects."""
        return [value for _, value in self.items()]

    def __iter__(self) -> Iterator[K]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()


class WeakIdentitySet(Generic[K]):
    """Some objects, as long as they live, told apart by what they are."""

    def __init__(self, members: Iterable[K] = ()) -> None:
        self._members: WeakIdentityDict[K, None] = WeakIdentityDict()
        for member in members:
            self.add(member)

    def add(self, member: K) -> None:
        """Add an object, unless it is there."""
        self._members.setdefault(member, None)

    def discard(self, member: K) -> None:
        """Take an object out, if it is there."""
        self._members.pop(member)

    def __contains__(self, member: K) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[K]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)
