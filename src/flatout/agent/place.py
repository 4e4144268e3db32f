"""One function of a class or a module in the place of another."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any


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
