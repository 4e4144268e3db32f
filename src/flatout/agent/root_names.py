"""Naming the root modules of a program, which are kept alive until the program ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from flatout.intercept import objects

LIMIT = 16
"""The largest number of modules that are kept. If there are more root modules, the first ones are
kept."""


class RootNames:
    """The root modules that were called so far. The name of a module is that of its class, followed
    by a number if it is not the first module of the class."""

    def __init__(self) -> None:
        self._roots: dict[int, tuple[str, Any]] = {}
        self._classes: Counter[str] = Counter()

    def add(self, module: Any) -> None:
        """Keep a module and give it a name, unless it is known or ``LIMIT`` is reached."""
        if id(module) not in self._roots and len(self._roots) < LIMIT:
            name = objects.class_name(module)
            self._classes[name] += 1
            count = self._classes[name]
            self._roots[id(module)] = (name if count == 1 else f"{name} {count}", module)

    def name_of(self, module: Any) -> str:
        """Return the name of a module, or that of its class if the module is not kept."""
        return self._roots.get(id(module), (objects.class_name(module), module))[0]

    def clear(self) -> None:
        """Release the modules."""
        self._roots.clear()

    def __contains__(self, module: object) -> bool:
        return id(module) in self._roots

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Iterate over names and modules, in the order in which they were added."""
        return iter(self._roots.values())
