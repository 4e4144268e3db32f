"""Handles Ctrl-C, SIGTERM and a closed terminal for verbs whose work must not be lost.

Inside ``watched``, such a signal is only noted, so it raises nothing in the middle of a decision or
a write. Long work asks for it: ``check`` raises before a trial starts, ``process.run`` kills the
running trial, and ``at_once`` marks a block that may be left at any place. So everything that is
proven is written down, and the verb ends within seconds.

SIGINT counts even if it was ignored at the start, as it is for background jobs of a script: a tune
that is told to end must end. SIGHUP does not count if it was ignored, as ``nohup`` wants it.
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
def note_signals() -> Iterator[None]:
    """Note these signals until the end of the block. Only the main thread can do so."""
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
    """Note a signal; returns whether it is one that ends the work."""
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
    """Stop here if a signal has come.

    Raises:
        KeyboardInterrupt: a signal has come.
    """
    if is_noted():
        raise KeyboardInterrupt


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let a signal leave the block at any place.

    Raises:
        KeyboardInterrupt: a signal has come before the block, or comes inside it.
    """
    global _leaves_at_once
    check()
    _leaves_at_once = True
    try:
        yield
    finally:
        _leaves_at_once = False


def exit_status() -> int:
    """The exit status that a shell reports for a process that the noted signal ended."""
    return 128 + (_noted or signal.SIGINT)


def _counts(number: int) -> bool:
    return number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN


def _note(number: int, frame: FrameType | None) -> None:
    note(number)
    if _leaves_at_once:
        raise KeyboardInterrupt
