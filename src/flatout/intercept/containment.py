"""What fails of ours must not reach the program; what the program raises must, and as it is.

Whatever torch or the program calls of ours goes through here: ``contained``, ``around``,
``attempt``. There, and nowhere else, it is decided whose an exception is. A failure of ours is
reported, and the program's own way is gone. It is never gone twice: what has returned is returned,
and what has raised goes through, the same object, without frames of ours.
"""

from __future__ import annotations

import dis
import functools
import importlib.util
import os
import signal
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

Failed = Callable[[Exception], None]
"""Told of a failure of ours."""

unreported: list[Exception] = []
"""Failures that could not be reported, because reporting failed as well; the first few."""

_MOST_UNREPORTED = 8


# Whose an exception is


def is_ours(error: Exception) -> bool:
    """Whether an exception that came out of code of ours is a failure of that, or of what it calls
    in torch, Pillow, NumPy and the standard library.

    It is not where code of the program lies below ours: a handler for a signal, say, or a function
    that traces. What has been raised into this thread from another one is of a type of the
    program's own.
    """
    kind = type(error).__module__.partition(".")[0]
    if kind not in _KNOWN and kind not in sys.stdlib_module_names:
        return False
    frames = list(_frames(error))
    below = next(
        (at for at in reversed(range(len(frames))) if _folder(frames[at]) == _OURS), len(frames)
    )
    called = frames[below:]
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()}
    return all(_folder(frame) is not None and frame.f_code not in handlers for frame in called)


def arose_in_ours(error: Exception) -> bool:
    """Whether an exception was raised by a line of ours, or by compiled code that it called: no
    function of torch or of the program, such as a hook, lies between."""
    frames = list(_frames(error))
    return bool(frames) and _folder(frames[-1]) == _OURS and is_ours(error)


def began_in_torch(error: Exception) -> bool:
    """Whether an exception of the program's own pass began in torch: in a function of it, or in
    compiled code that a line of the program has called without raising anything itself."""
    link, last = error.__traceback__, None
    while link is not None:
        last = last if _folder(link.tb_frame) == _OURS else link
        link = link.tb_next
    if last is None:
        return False
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()}
    if any(frame.f_code in handlers for frame in _frames(error)):
        return False
    if _folder(last.tb_frame) == _TORCH:
        return True
    is_of_kind = isinstance(error, (RuntimeError, TypeError))
    return is_of_kind and not isinstance(error, RecursionError) and not _is_raise(last)


def without_our_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """A traceback without the frames of ours in it."""
    links: list[types.TracebackType] = []
    while trace is not None:
        if _folder(trace.tb_frame) != _OURS:
            links.append(trace)
        trace = trace.tb_next
    for link in reversed(links):
        if link.tb_next is not trace:
            link.tb_next = trace
        trace = link
    return trace


E = TypeVar("E", bound=BaseException)


def _stripped(error: E) -> E:
    return error.with_traceback(without_our_frames(error.__traceback__))


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    link = error.__traceback__
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


def _is_raise(link: types.TracebackType) -> bool:
    """Whether the frame is at a ``raise`` statement, or at the end of a handler that passes on."""
    opcode = link.tb_frame.f_code.co_code[link.tb_lasti]
    return dis.opname[opcode] in ("RAISE_VARARGS", "RERAISE")


def _folder(frame: types.FrameType) -> str | None:
    """Of these that a frame's code lies in; ``None``: it is the program's."""
    file = frame.f_code.co_filename
    if file not in _folders:
        _folders[file] = next((at for at in _PLACES if file.startswith(at)), None)
        if _folders[file] == _STANDARD_LIBRARY and "-packages" + os.sep in file:
            _folders[file] = None
    return _folders[file]


def _package(name: str) -> str:
    """The folder of a package, with a separator behind it; one that does not exist, if none is."""
    spec = importlib.util.find_spec(name) if name not in sys.modules else sys.modules[name].__spec__
    found = list(spec.submodule_search_locations or ()) if spec is not None else []
    return found[0] + os.sep if found else os.devnull + os.sep


def _code(handler: Any) -> Any:
    """The code object of a signal's handler, ``None`` for one that is not in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if callable(handler) and not isinstance(handler, (types.FunctionType, types.MethodType)):
        handler = handler.__call__
    return getattr(handler, "__code__", None)


_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = _package("torch")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_LIBRARIES = ("torch", "PIL", "numpy")
_PLACES = (_OURS, *map(_package, _LIBRARIES), _STANDARD_LIBRARY, "<frozen")
_KNOWN = frozenset({"builtins", "flatout", *_LIBRARIES})
_folders: dict[str, str | None] = {}


# The borders


def report(failed: Failed, error: Exception) -> None:
    """Tell of a failure; where that fails as well, it is kept for the end.

    Raises:
        Exception: the failure itself, of one who is told and wants to have it raised.
    """
    try:
        failed(error)
    except Exception as second:
        if second is error or not is_ours(second):
            raise
        if len(unreported) < _MOST_UNREPORTED:
            unreported.extend((error, second))


def attempt(failed: Failed, function: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """What ``function`` gives; ``None`` where it fails, which is told then.

    Nothing of the program may be called in there, and nothing that saves tensors for autograd:
    what is called for that is the program's as well.

    Raises:
        BaseException: it is not ours: see ``is_ours``.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - reported, or raised as it is
        if not is_ours(error):
            raise _stripped(error)  # noqa: B904 - the same
        failure = error
    try:
        report(failed, failure)
    finally:
        del failure  # which has this frame
    return None


def contained(failed: Failed, function: Callable[..., T]) -> Callable[..., T | None]:
    """``function``, which torch or an interpreter calls, as an ``attempt``."""

    def border(*args: Any, **kwargs: Any) -> T | None:
        return attempt(failed, function, *args, **kwargs)

    return border


class Theirs:
    """A call that the program makes, given to what of ours lies around it.

    Args:
        own: what the program calls.
    """

    __slots__ = ("_own", "raised", "result", "was_called")

    def __init__(self, own: Callable[..., Any]) -> None:
        self._own = own
        self.was_called = False
        self.result: Any = None
        self.raised: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.was_called = True
        try:
            self.result = self._own(*args, **kwargs)
        except BaseException as error:
            self.raised = error
            raise
        return self.result


def around(failed: Failed, ours: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """``ours`` in the place of ``own``, which it gets as its first argument and calls once at most.

    Where ``ours`` fails, that is told, and the program gets what ``own`` has given, or gives.
    """

    def border(*args: Any, **kwargs: Any) -> Any:
        theirs = Theirs(own)
        failure: BaseException | None = None
        try:
            try:
                return ours(theirs, *args, **kwargs)
            except Exception as error:
                if error is theirs.raised or (theirs.raised is None and not is_ours(error)):
                    raise
                failure = error
            report(failed, failure)
            failure = theirs.raised
        except BaseException as error:  # noqa: BLE001 - raised as it is
            raise _stripped(error)  # noqa: B904 - the same
        else:
            if failure is not None:
                raise _stripped(failure)
            return theirs.result if theirs.was_called else own(*args, **kwargs)
        finally:
            del theirs, failure  # an exception has this frame, and must not be had by it

    return border


def call_module(
    call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """As the program does it; to be what ``around`` calls."""
    return call(module, *args, **kwargs)


def knob_of(callback: Any) -> str | None:
    """The knob that a callback belongs to; ``None``: to the agent."""
    module = getattr(callback, "__module__", None) or type(callback).__module__
    package, folder, name = (*module.split("."), "", "", "")[:3]
    return name if (package, folder) == ("flatout", "knobs") and name else None
