"""One method of a class of torch in the place of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def take_place(owner: type, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Put ``function`` where a method is.

    Returns:
        What puts the method back, unless the program has put another one there meanwhile.
    """
    own = owner.__dict__[name]
    setattr(owner, name, function)

    def undo() -> None:
        if owner.__dict__.get(name) is function:
            setattr(owner, name, own)

    return undo
