"""One function of a class or a module in the place of another."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from flatout.agent.containment import Failed, around


def take_place(
    owner: type | ModuleType, name: str, function: Callable[..., Any]
) -> Callable[[], None]:
    """Put ``function`` where a method of a class, or a function of a module, is.

    Returns:
        What puts that back, unless the program has put another one there meanwhile.
    """
    own = owner.__dict__[name]
    setattr(owner, name, function)

    def undo() -> None:
        if owner.__dict__.get(name) is function:
            setattr(owner, name, own)

    return undo


def stand_before(
    owner: type | ModuleType, name: str, failed: Failed, function: Callable[..., Any]
) -> Callable[[], None]:
    """The same for a ``function`` that gets the one which was there as its first argument, and
    behind it what that would get. Where it fails, the other does what it would without it; see
    ``containment.around``.
    """
    return take_place(owner, name, around(failed, function, owner.__dict__[name]))
