"""Installing and removing the watches of ``_watch.c`` on classes and modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from flatout.intercept import _watch, objects

_METHOD_DESCRIPTOR = 1 << 17
"""The flag ``Py_TPFLAGS_METHOD_DESCRIPTOR``. A class attribute whose type has it is called with the
instance before the other arguments. Properties and static methods do not have it."""


class ClassWatch:
    """A watch that replaces a special method of a class.

    Only a weak reference to the class is kept. The class itself holds the watch, and the watch
    holds the original method. The watch is set by ``type.__setattr__``, which calls no
    ``__setattr__`` of the metaclass.

    Args:
        log: the event log that the watch writes to.
        owner: the class.
        name: the name of the special method.
        phase: the phase (see ``wire.turns.PHASES``) whose begin and end are recorded at each call;
            -1: nothing is recorded.
        before: called with the instance when a call begins; ``None``: nothing is called.

    Attributes:
        class_name: the qualified name of the class.
    """

    def __init__(
        self,
        log: _watch.Log,
        owner: type,
        name: str,
        phase: int,
        before: Callable[..., Any] | None = None,
    ) -> None:
        self.class_name = objects.qualified_name(owner)
        self._log = log
        self._owner = weakref.ref(owner)
        self._name = name
        self._phase = phase
        self._before = before
        self._watch: Callable[[], _watch.Watch | None] = lambda: None

    def install(self) -> str | None:
        """Install the watch, unless it is installed; return the reason if that is impossible."""
        owner = self._owner()
        if owner is None:
            return None
        original = objects.namespace(owner).get(self._name)
        if original is not None and original is self._watch():
            return None
        if isinstance(original, _watch.Watch):
            original = original.original  # the namespace was copied from that of a watched class
        method = original
        if original is None:
            method = objects.inherited(owner, self._name, after=True)
        if not objects.flags(type(method)) & _METHOD_DESCRIPTOR:
            return f"its {self._name} is of the type {objects.class_name(method)}"
        watch = _watch.Watch(self._log, self._phase, original, owner, self._name, self._before)
        try:
            type.__setattr__(owner, self._name, watch)
        except TypeError as error:  # an immutable class, or a metaclass that is written in C
            return str(error)
        self._watch = weakref.ref(watch)
        return None

    def remove(self) -> None:
        """Restore the original method, unless the program has replaced the watch."""
        owner, watch = self._owner(), self._watch()
        if owner is None or watch is None:
            return
        current: Any = objects.namespace(owner).get(self._name)
        if current is not watch:
            return
        if watch.original is not None:
            type.__setattr__(owner, self._name, watch.original)
        else:
            type.__delattr__(owner, self._name)


class FunctionWatch:
    """A watch that replaces a function of a module.

    Args:
        log: the event log that the watch writes to.
        module: the Python module.
        name: the name of the function.
        phase: the phase whose begin and end are recorded at each call.

    Attributes:
        name: the name of the function.
        original: the original function.
    """

    def __init__(self, log: _watch.Log, module: Any, name: str, phase: int) -> None:
        self.name = name
        self.original = getattr(module, name)
        self._module = module
        self._watch = _watch.Watch(log, phase, self.original, None, name, None)

    def install(self) -> None:
        """Replace the function by the watch."""
        setattr(self._module, self.name, self._watch)

    def remove(self) -> None:
        """Restore the original function, unless the program has replaced the watch."""
        if getattr(self._module, self.name, None) is self._watch:
            setattr(self._module, self.name, self.original)
