"""Keeping flatout's own failures away from the program, and the program's exceptions unchanged.

Every function of flatout that torch or the program calls is called through ``contain``, ``wrap`` or
``attempt``. These alone decide whether an exception is a failure of flatout or belongs to the
program. A failure of flatout is reported, and the call is made as it would be without flatout. The
program's call is made at most once: if it has returned, its result is used, and if it has raised,
the same exception object is raised. The frames of flatout inside the call are removed from its
traceback. Frames of flatout around the call are added again as the exception passes them;
``_watch.c`` removes these too for forward calls.
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

OnFailure = Callable[[Exception], None]
"""Called with a failure of flatout."""

unreported: list[Exception] = []
"""The first failures that could not be reported, because reporting them failed as well."""

_MOST_UNREPORTED = 8


# Who is responsible for an exception


def is_flatout_failure(error: Exception) -> bool:
    """Whether an exception that came out of a function of flatout is a failure of that function, or
    of what it calls in torch, Pillow, NumPy and the standard library.

    The exception belongs to the program if the program's code ran inside flatout's innermost frame
    (in a signal handler or a trace function), or if the program defines the exception's type, as it
    may with an exception that another thread raises into this one.
    """
    package = type(error).__module__.partition(".")[0]
    if package not in _KNOWN_PACKAGES and package not in sys.stdlib_module_names:
        return False
    frames = list(_frames(error))
    innermost_flatout = next(
        (i for i in reversed(range(len(frames))) if _folder(frames[i]) == _FLATOUT), len(frames)
    )
    handlers = _signal_handler_codes()
    return all(
        _folder(frame) is not None and frame.f_code not in handlers
        for frame in frames[innermost_flatout:]
    )


def was_raised_by_flatout(error: Exception) -> bool:
    """Whether an exception was raised by a line of flatout, or by C code that was called from that
    line, with no Python function of torch or of the program (such as a module hook) in between."""
    frames = list(_frames(error))
    return bool(frames) and _folder(frames[-1]) == _FLATOUT and is_flatout_failure(error)


def was_raised_by_torch(error: Exception) -> bool:
    """Whether an exception of the program's own forward pass was raised by torch: by a Python
    function of torch, or by C code called from a line of the program that is not a ``raise``
    statement."""
    link, last = error.__traceback__, None
    while link is not None:
        last = last if _folder(link.tb_frame) == _FLATOUT else link
        link = link.tb_next
    if last is None:
        return False
    handlers = _signal_handler_codes()
    if any(frame.f_code in handlers for frame in _frames(error)):
        return False
    if _folder(last.tb_frame) == _TORCH:
        return True
    has_type_of_torch = isinstance(error, (RuntimeError, TypeError))
    return has_type_of_torch and not isinstance(error, RecursionError) and not _is_at_raise(last)


def strip_frames(trace: types.TracebackType | None) -> types.TracebackType | None:
    """Return a traceback without the frames of flatout."""
    links: list[types.TracebackType] = []
    while trace is not None:
        if _folder(trace.tb_frame) != _FLATOUT:
            links.append(trace)
        trace = trace.tb_next
    for link in reversed(links):
        if link.tb_next is not trace:
            link.tb_next = trace
        trace = link
    return trace


E = TypeVar("E", bound=BaseException)


def _strip(error: E) -> E:
    """Remove the frames of flatout from the traceback of an exception. ``raise`` adds the current
    frame again."""
    return error.with_traceback(strip_frames(error.__traceback__))


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    link = error.__traceback__
    while link is not None:
        yield link.tb_frame
        link = link.tb_next


def _is_at_raise(link: types.TracebackType) -> bool:
    """Whether the frame is at a ``raise`` statement, or at the end of a handler that re-raises."""
    opcode = link.tb_frame.f_code.co_code[link.tb_lasti]
    return dis.opname[opcode] in ("RAISE_VARARGS", "RERAISE")


def _folder(frame: types.FrameType) -> str | None:
    """Return the folder of ``_FOLDERS`` that holds the code of a frame; ``None`` if the code is the
    program's."""
    file = frame.f_code.co_filename
    if file not in _folder_of_file:
        folder = next((folder for folder in _FOLDERS if file.startswith(folder)), None)
        if folder == _STANDARD_LIBRARY and "-packages" + os.sep in file:
            folder = None
        _folder_of_file[file] = folder
    return _folder_of_file[file]


def is_of_flatout(frame: types.FrameType) -> bool:
    """Whether the code of a frame is flatout's."""
    return _folder(frame) == _FLATOUT


def _package_folder(name: str) -> str:
    """Return the folder of a package with a trailing separator, or a path that cannot exist if the
    package is not installed."""
    spec = importlib.util.find_spec(name) if name not in sys.modules else sys.modules[name].__spec__
    found = list(spec.submodule_search_locations or ()) if spec is not None else []
    return found[0] + os.sep if found else os.devnull + os.sep


def _signal_handler_codes() -> set[Any]:
    return {_handler_code(signal.getsignal(number)) for number in signal.valid_signals()}


def _handler_code(handler: Any) -> Any:
    """Return the code object of a signal handler, ``None`` if it is not written in Python."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    if callable(handler) and not isinstance(handler, (types.FunctionType, types.MethodType)):
        handler = handler.__call__
    return getattr(handler, "__code__", None)


_FLATOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = _package_folder("torch")
_STANDARD_LIBRARY = sysconfig.get_paths()["stdlib"] + os.sep
_LIBRARIES = ("torch", "PIL", "numpy")
_FOLDERS = (_FLATOUT, *map(_package_folder, _LIBRARIES), _STANDARD_LIBRARY, "<frozen")
_KNOWN_PACKAGES = frozenset({"builtins", "flatout", *_LIBRARIES})
_folder_of_file: dict[str, str | None] = {}


# Containing failures


def report(on_failure: OnFailure, error: Exception) -> None:
    """Call ``on_failure`` with a failure; if that fails as well, add both to ``unreported``.

    Raises:
        Exception: ``error`` itself, if ``on_failure`` raises it on purpose, or an exception that is
            no failure of flatout.
    """
    try:
        on_failure(error)
    except Exception as second:
        if second is error or not is_flatout_failure(second):
            raise
        if len(unreported) < _MOST_UNREPORTED:
            unreported.extend((error, second))


def attempt(
    on_failure: OnFailure, function: Callable[..., T], *args: Any, **kwargs: Any
) -> T | None:
    """Call ``function`` and return its result, or report its failure and return ``None``.

    ``function`` must neither call code of the program nor save tensors for autograd, since that
    calls the program's saved-tensor hooks.

    Raises:
        BaseException: one that is no failure of flatout; see ``is_flatout_failure``.
    """
    try:
        return function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - reported, or raised unchanged
        if not is_flatout_failure(error):
            raise _strip(error)  # noqa: B904 - the same exception
        failure = error
    try:
        report(on_failure, failure)
    finally:
        del failure  # its traceback refers to this frame: a reference cycle
    return None


def contain(on_failure: OnFailure, function: Callable[..., T]) -> Callable[..., T | None]:
    """Return a callback for torch or CPython that calls ``function`` by ``attempt``."""

    def call(*args: Any, **kwargs: Any) -> T | None:
        return attempt(on_failure, function, *args, **kwargs)

    return call


class OriginalCall:
    """Proxy for the original function that is passed to a wrapper. It records whether the call
    returned or raised.

    Args:
        original: the original function.

    Attributes:
        was_called: whether the wrapper has called the proxy.
        result: the value that the original function returned.
        raised: the exception that the original function raised; ``None`` if it has raised none.
    """

    __slots__ = ("_original", "raised", "result", "was_called")

    def __init__(self, original: Callable[..., Any]) -> None:
        self._original = original
        self.was_called = False
        self.result: Any = None
        self.raised: BaseException | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call_part(self._original, *args, **kwargs)

    def call_part(self, part: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a part of the original function in its place, such as what it wraps itself."""
        self.was_called = True
        try:
            self.result = part(*args, **kwargs)
        except BaseException as error:
            self.raised = error
            raise
        return self.result


def wrap(
    on_failure: OnFailure, wrapper: Callable[..., Any], original: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that calls ``wrapper(original, *args, **kwargs)``.

    Args:
        on_failure: called if ``wrapper`` fails. The result is then that of ``original``, which is
            called now unless ``wrapper`` has called it already.
        wrapper: calls ``original`` at most once.
        original: the function that the program calls.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        original_call = OriginalCall(original)
        failure: Exception | None = None
        program_error: BaseException | None = None
        try:
            try:
                return wrapper(original_call, *args, **kwargs)
            except Exception as error:
                if error is original_call.raised or (
                    original_call.raised is None and not is_flatout_failure(error)
                ):
                    raise
                failure = error
            report(on_failure, failure)
            program_error = original_call.raised
        except BaseException as error:  # noqa: BLE001 - raised unchanged
            raise _strip(error)  # noqa: B904 - the same exception
        else:
            if program_error is not None:
                raise _strip(program_error)
            if original_call.was_called:
                return original_call.result
            return original(*args, **kwargs)
        finally:
            # A traceback refers to this frame, so this frame must not refer to the exception.
            del original_call, failure, program_error

    return call


def call_module(
    call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call the module unchanged. ``StepCallbacks`` passes this as ``original`` when it wraps
    forward calls."""
    return call(module, *args, **kwargs)


def knob_of(callback: Any) -> str | None:
    """Return the name of the knob that a callback belongs to, ``None`` if it is the agent's."""
    module = getattr(callback, "__module__", None) or type(callback).__module__
    package, folder, name = (*module.split("."), "", "", "")[:3]
    return name if (package, folder) == ("flatout", "knobs") and name else None
