"""Shows progress while a verb works: a line that is overwritten, or plain lines.

Nothing here starts a thread, because the controller forks, and nothing hides the cursor, because
flatout cannot show it again when it is killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from types import TracebackType
from typing import TextIO

from flatout.text import printable
from flatout.tune import formatting
from flatout.tune.progress import Activity

_ERASE = "\r\x1b[K"
"""Moves the cursor to the start of the line and erases the line (ECMA-48, EL)."""

_ROUNDING_S = 10
"""The time left is shown in multiples of this, below a minute and a half."""


class LiveLine:
    """A line of a terminal that is overwritten. It shows nothing if the file is no terminal.

    The cursor stays at its start, so that the output of another process overwrites it.

    Args:
        file: the terminal.

    Attributes:
        is_live: whether the file is a terminal that can erase a line.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._shown = ""
        self.is_live = file.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, text: str) -> None:
        """Show a text, cut off at the width of the terminal."""
        text = printable(text)[: max(self._columns() - 1, 0)]
        if self.is_live and text != self._shown:
            self._write(f"{_ERASE}{text}\r")
            self._shown = text

    def clear(self) -> None:
        """Erase the line."""
        if self._shown:
            self._write(_ERASE)
            self._shown = ""

    def _columns(self) -> int:
        with contextlib.suppress(OSError, ValueError):
            return os.get_terminal_size(self._file.fileno()).columns
        return shutil.get_terminal_size().columns

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            self._file.write(text)
            self._file.flush()


class Progress:
    """Shows the progress of a tune; a context manager around it.

    On a terminal, a line that is overwritten shows the current phase, and each phase that is over
    leaves a line with its time. Elsewhere each phase prints a line when it begins.

    Args:
        quiet: print and show nothing.
        verbose: print what each trial found, instead of a line for each phase.
        file: where it prints, by default ``sys.stderr``.
    """

    def __init__(
        self, *, quiet: bool = False, verbose: bool = False, file: TextIO | None = None
    ) -> None:
        self._quiet, self._verbose = quiet, verbose
        self._file = sys.stderr if file is None else file
        self._line = LiveLine(self._file)
        self._what = ""
        self._began_s = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._finish()
        self._line.clear()

    def say(self, line: str) -> None:
        """Print what a trial found, if ``verbose``."""
        if self._verbose and not self._quiet:
            self._print(line)

    def warn(self, line: str) -> None:
        """Print what the user should know at once."""
        if not self._quiet:
            self._print(line)

    def show(self, activity: Activity | None, left_s: float | None) -> None:
        """Show the current phase. It may be called several times a second.

        Args:
            activity: what the tune is doing; ``None`` if it has not begun.
            left_s: seconds until the phase should be over; ``None``: not known.
        """
        if activity is None or self._quiet:
            return
        text = f"{activity.what}{_pair(activity)}{_left(activity, left_s)}"
        if activity.what != self._what:
            self._finish()
            self._what, self._began_s = activity.what, time.monotonic()
            if not self._line.is_live and not self._verbose:
                self._print(text)
        self._line.show(f"flatout: {text}")

    def _finish(self) -> None:
        """Print a line about the phase that is over."""
        if self._line.is_live and self._what and not self._verbose:
            took = formatting.duration(time.monotonic() - self._began_s)
            self._print(f"{self._what} ({took})")
        self._what = ""

    def _print(self, line: str) -> None:
        self._line.clear()
        with contextlib.suppress(OSError):
            print(f"flatout: {printable(line)}", file=self._file, flush=True)


def _pair(activity: Activity) -> str:
    if activity.pair is None:
        return ""
    if activity.pairs is None:
        return f": pair {activity.pair}"
    at_least = "at least " if activity.may_exceed_pairs else ""
    return f": pair {activity.pair} of {at_least}{activity.pairs}"


def _left(activity: Activity, seconds: float | None) -> str:
    """The time left, as the end of a line: an estimate if the number of pairs is known, or else the
    rest of the budget."""
    if not seconds:
        return ""
    about = "up to" if activity.pairs is None else "about"
    if seconds <= 90:
        return f", {about} {_ROUNDING_S * math.ceil(seconds / _ROUNDING_S)} s left"
    return f", {about} {math.ceil(seconds / 60)} min left"
