"""Replacing or wrapping one function of a class or a module, and undoing it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from flatout.intercept.containment import OnFailure, wrap

Undo = Callable[[], None]
"""Undoes a change: restores the state before it."""


def replace_function(owner: type | ModuleType, name: str, function: Callable[..., Any]) -> Undo:
    """Replace a method of a class, or a function of a module, by ``function``.

    Code that inspects the replacement instead of calling it (``torch.jit.script``, ``inspect``,
    ``pickle``) sees the original function.

    Returns:
        The undo. It does nothing if the program or another patch has replaced the function
        meanwhile. So two knobs that patch one function need a common claim (``knob.Knob.claims``).
    """
    original = owner.__dict__[name]
    replacement = function
    if isinstance(original, FunctionType):
        replacement = _disguise(function, original)
    setattr(owner, name, replacement)

    def undo() -> None:
        if owner.__dict__.get(name) is replacement:
            setattr(owner, name, original)

    return undo


def wrap_function(
    owner: type | ModuleType, name: str, on_failure: OnFailure, wrapper: Callable[..., Any]
) -> Undo:
    """Wrap a method of a class, or a function of a module.

    Calls made while ``torch.compile`` traces go to the original function directly.

    Args:
        owner: the class or the Python module.
        name: the name of its function.
        on_failure: called if ``wrapper`` fails; the program then gets the result of the original
            function (see ``containment.wrap``).
        wrapper: called as ``wrapper(original, *args, **kwargs)``.

    Returns:
        The undo of ``replace_function``.
    """
    import torch

    original = owner.__dict__[name]
    contained = wrap(on_failure, wrapper, original)
    is_compiling = torch.compiler.is_compiling

    def call(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if is_compiling() else contained(*args, **kwargs)

    return replace_function(owner, name, call)


def _disguise(function: Callable[..., Any], original: FunctionType) -> Callable[..., Any]:
    """Return a function that calls ``function``, with the name, signature, source and globals of
    ``original``.

    TorchScript compiles the source that ``inspect`` finds and resolves names by the globals of the
    function that it was given, so both must be those of the original function.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    disguised = FunctionType(
        call.__code__, original.__globals__, original.__name__, None, call.__closure__
    )
    return functools.update_wrapper(disguised, original)


def add_attribute(owner: type, name: str, attribute: Any) -> Undo:
    """Define an attribute on a class that so far only inherits it. The undo removes it again."""
    setattr(owner, name, attribute)

    def undo() -> None:
        if owner.__dict__.get(name) is attribute:
            delattr(owner, name)

    return undo
