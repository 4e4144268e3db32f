"""Ctrl-C, SIGTERM and a closed terminal, for verbs whose work must not be lost.

While ``watched`` is on, such a signal is only noted: it raises nothing in the middle of what is
being decided or written. What takes long asks: ``check`` raises before a trial starts,
``process.run`` ends the trial that runs, and ``at_once`` marks what may be left at any place. So
what is proven is written down, and the verb ends within seconds.

SIGINT counts also where it was ignored at the start, as in a script's background: a tune that is
told to end shall end. SIGHUP does not count there, which is what nohup is for.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_watching = _leaves_at_once = False
_noted: signal.Signals | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Note these signals until the end of the block; no other thread than the main one can."""
    global _noted, _watching
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS if _counts(number)}
    _watching = True
    for number in before:
        signal.signal(number, _note)
    try:
        yield
    finally:
        _watching, _noted = False, None
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def note(number: int) -> bool:
    """A signal has come; returns whether it is one that ends the work."""
    global _noted
    if number not in SIGNALS or not _counts(number):
        return False
    if _watching:
        _noted = _noted or signal.Signals(number)
    return True


def is_noted() -> bool:
    """Whether a signal has come."""
    return _noted is not None


def check() -> None:
    """Go no further if a signal has come.

    Raises:
        KeyboardInterrupt: one has.
    """
    if is_noted():
        raise KeyboardInterrupt


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """The block may be left at any place.

    Raises:
        KeyboardInterrupt: a signal came before, or comes now.
    """
    global _leaves_at_once
    check()
    _leaves_at_once = True
    try:
        yield
    finally:
        _leaves_at_once = False


def exit_status() -> int:
    """Of a process that has ended its work because of the signal, as a shell would say it."""
    return 128 + (_noted or signal.SIGINT)


def _counts(number: int) -> bool:
    return number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN


def _note(number: int, frame: FrameType | None) -> None:
    note(number)
    if _leaves_at_once:
        raise KeyboardInterrupt
