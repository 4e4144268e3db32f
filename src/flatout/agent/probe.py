"""Watching a callable without a frame of ours on the stack while it runs.

A wrapper function would show up in every traceback of the user's program. A ``Probe`` does not: it
is looked up when the call begins, and the object it hands to the interpreter for the call dies when
the call ends, by return or by exception. Both moments run a little Python of ours; in between there
is only C. This rests on CPython's reference counting, which PyTorch needs anyway.

A probe stands in a namespace in the place of the function it watches:

- in a class, for a special method (``__call__``, ``__next__``, ``__iter__``): looked up on the
  class it gives the original function: Dynamo, ``inspect`` and FX see what they would without it;
- in a module, for a function: it is called as the function would be.

Pickled by value (cloudpickle does so with classes of ``__main__``), it becomes the original.
"""

from __future__ import annotations

import functools
import operator
import os
import sys
import types
from collections.abc import Callable
from typing import Any

BeginCall = Callable[[Any, "Callable[..., Any]"], "Callable[..., Any] | None"]
"""Called as a call begins, with the instance (``None`` for a function of a module) and the original
function. Returns what to call (the original, as a rule), or ``None``: this call is not watched,
``end`` will not be called."""


class _Running(functools.partial):  # type: ignore[type-arg]
    """The callable of one running call; its death is the end of the call."""

    __slots__ = ("end",)

    end: Callable[[], None]

    def __del__(self) -> None:
        try:
            self.end()
        except BaseException as error:  # noqa: BLE001 - nothing is swallowed, see below
            if is_ours(error):
                report("probe", error)
            else:
                # A signal handler of the program has raised in here, where the interpreter would
                # print and drop the exception; the next probed call raises it instead.
                _Faults.deferred = error


class _Faults:
    """What went wrong inside a probe.

    Attributes:
        deferred: an exception of the program's own, to be raised by the next probed call.
        report: where an error of ours goes.
    """

    deferred: BaseException | None = None
    report: Callable[[str, BaseException], None]


def report_to(function: Callable[[str, BaseException], None]) -> None:
    """Set where errors of ours go: called with a subject and the error."""
    _Faults.report = staticmethod(function)


def report(subject: str, error: BaseException) -> None:
    """Report an error of ours."""
    _Faults.report(subject, error)


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.sep + "torch" + os.sep


def is_ours(error: BaseException) -> bool:
    """Whether an error arose in our code, not in a signal handler of the program run inside it."""
    if not isinstance(error, Exception):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    file = trace.tb_frame.f_code.co_filename
    return file.startswith(_PACKAGE) or _TORCH in file


class _BeginAtCall:
    """The ``__call__`` of ``_Bound`` and of module probes: evaluated when the call begins."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        if _Faults.deferred is not None:
            error, _Faults.deferred = _Faults.deferred, None
            raise error
        probe = instance.probe
        target = instance.target
        original = probe.original()
        try:
            replacement = probe.begin(target, original)
        except Exception as error:
            if not is_ours(error):
                raise
            report(probe.name, error)
            replacement = None
        if replacement is None:
            return original if target is None else types.MethodType(original, target)
        running = _Running(replacement) if target is None else _Running(replacement, target)
        running.end = probe.end
        return running


class _Bound:
    """What a class probe gives for an instance: nothing happens until it is called."""

    __slots__ = ("probe", "target")

    def __init__(self, probe: ClassProbe, target: Any) -> None:
        self.probe = probe
        self.target = target

    __call__ = _BeginAtCall()

    def _method(self) -> Any:
        return types.MethodType(self.probe.original(), self.target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method(), name)

    def __repr__(self) -> str:
        return repr(self._method())

    def __eq__(self, other: object) -> bool:
        return self._method() == (other._method() if isinstance(other, _Bound) else other)

    def __hash__(self) -> int:
        return hash(self._method())

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.target, self.probe.name)


class ClassProbe:
    """Watches the special method ``name`` of a class.

    Args:
        owner: the class whose namespace gets the probe.
        name: the special method.
        begin: see ``BeginCall``.
        end: called without arguments when a call ends for which ``begin`` gave a callable.
    """

    def __init__(self, owner: type, name: str, begin: BeginCall, end: Callable[[], None]) -> None:
        self.owner = owner
        self.name = name
        self.begin = begin
        self.end = end
        self._own = owner.__dict__.get(name)
        self._provider = (
            next(
                base
                for base in (*owner.__mro__[1:], object)
                if name in base.__dict__ and not isinstance(base.__dict__[name], ClassProbe)
            )
            if self._own is None
            else owner
        )

    def original(self) -> Any:
        """The function that a call reaches without the probe, as it is now."""
        return self._own if self._own is not None else self._provider.__dict__[self.name]

    def install(self) -> None:
        """Put the probe in its place.

        Raises:
            TypeError: the class does not allow it.
        """
        setattr(self.owner, self.name, self)

    def remove(self) -> None:
        """Put the class back as it was; a later replacement by the program stays."""
        if self.owner.__dict__.get(self.name) is not self:
            return
        if self._own is not None:
            setattr(self.owner, self.name, self._own)
        else:
            delattr(self.owner, self.name)

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self.original()
        if sys._getframe(1).f_code.co_name == "_initialize":
            # torch.compile(module) takes module.__call__ as the function to compile
            # (OptimizedModule._initialize), and compiles plain methods only.
            return types.MethodType(self.original(), instance)
        return _Bound(self, instance)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:
            return operator.itemgetter(0), ((self._own,),)
        return getattr, (self._provider, self.name)


class FunctionProbe:
    """Watches the function ``name`` of a module namespace; arguments as for ``ClassProbe``.

    ``begin`` is called with ``None``; it can look at the caller's frame for the arguments.
    """

    __slots__ = ("_original", "begin", "end", "name", "namespace", "probe", "target")

    def __init__(
        self, namespace: types.ModuleType, name: str, begin: BeginCall, end: Callable[[], None]
    ) -> None:
        self.namespace = namespace
        self.name = name
        self.begin = begin
        self.end = end
        self._original = getattr(namespace, name)
        self.probe = self
        self.target = None

    __call__ = _BeginAtCall()

    def original(self) -> Any:
        """The function that is watched."""
        return self._original

    def install(self) -> None:
        """Put the probe in its place."""
        setattr(self.namespace, self.name, self)

    def remove(self) -> None:
        """Put the namespace back as it was; a later replacement by the program stays."""
        if getattr(self.namespace, self.name, None) is self:
            setattr(self.namespace, self.name, self._original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.itemgetter(0), ((self._original,),)
