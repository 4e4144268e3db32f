"""One function of a class or a module in the place of another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from flatout.intercept.containment import Failed, around

Undo = Callable[[], None]
"""Puts back what was there."""


def take_place(owner: type | ModuleType, name: str, function: Callable[..., Any]) -> Undo:
    """Put ``function`` where a method of a class, or a function of a module, is.

    To those who look at it instead of calling it (``torch.jit.script``, ``inspect``, ``pickle``) it
    is what was there.

    Returns:
        What puts that back, unless the program has put another one there meanwhile.
    """
    own = owner.__dict__[name]
    taken = _looks_like(own, function) if isinstance(own, FunctionType) else function
    setattr(owner, name, taken)

    def undo() -> None:
        if owner.__dict__.get(name) is taken:
            setattr(owner, name, own)

    return undo


def stand_before(
    owner: type | ModuleType, name: str, failed: Failed, function: Callable[..., Any]
) -> Undo:
    """The same for a ``function`` that gets the one which was there as its first argument, and
    behind it what that would get. Where it fails, the other does what it would without it; see
    ``containment.around``. What is compiled meets the other alone.
    """
    import torch

    own = owner.__dict__[name]
    contained = around(failed, function, own)
    is_compiling = torch.compiler.is_compiling

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs) if is_compiling() else contained(*args, **kwargs)

    return take_place(owner, name, stand_in)


def _looks_like(own: FunctionType, function: Callable[..., Any]) -> Callable[..., Any]:
    """What calls ``function``, and has the name, signature, source and globals of ``own``.

    TorchScript compiles the source that ``inspect`` finds, by the globals of the function that it
    was given: so these must belong together.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    made = FunctionType(
        stand_in.__code__, own.__globals__, own.__name__, None, stand_in.__closure__
    )
    return functools.update_wrapper(made, own)


def add_attribute(owner: type, name: str, attribute: Any) -> Undo:
    """Give a class an attribute that only its base has; the undo takes it away again."""
    setattr(owner, name, attribute)

    def undo() -> None:
        if owner.__dict__.get(name) is attribute:
            delattr(owner, name)

    return undo
