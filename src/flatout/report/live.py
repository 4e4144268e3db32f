"""What is shown while a verb works: a line that is overwritten, or plain lines.

Nothing here starts a thread, because the controller forks, and nothing hides the cursor, because a
flatout that was killed could not show it again.
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
from flatout.tune import figures
from flatout.tune.progress import Phase

_ERASE = "\r\x1b[K"
"""To the start of the line, and what is on it away (ECMA-48, EL)."""

_ROUNDING_S = 10
"""The time left is shown in multiples of this, below a minute and a half."""


class LiveLine:
    """One line of a terminal that is overwritten; nothing where the file is no terminal.

    The cursor stays at its start, so that what another process prints takes its place.

    Args:
        file: where to.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._shown = ""
        self.is_live = file.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, text: str) -> None:
        """Show a text, cut off where the terminal ends."""
        text = printable(text)[: max(self._columns() - 1, 0)]
        if self.is_live and text != self._shown:
            self._write(f"{_ERASE}{text}\r")
            self._shown = text

    def clear(self) -> None:
        """Take the line away."""
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
    """The progress of a tune: context manager around it.

    On a terminal the phase stands in a line that is overwritten, and leaves a line with its time
    when it is over. Elsewhere each phase is a line when it begins.

    Args:
        quiet: print and show nothing.
        verbose: print what is said about each trial instead of the phases.
        file: where to, by default ``sys.stderr``.
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
        """Say what became of a trial; only where the user wants all of it."""
        if self._verbose and not self._quiet:
            self._print(line)

    def show(self, phase: Phase | None, left_s: float | None) -> None:
        """Show the phase; cheap enough to be called several times a second.

        Args:
            phase: that goes on now.
            left_s: seconds until it should be over; ``None``: not known.
        """
        if phase is None or self._quiet:
            return
        text = f"{phase.what}{_pair(phase)}{_left(phase, left_s)}"
        if phase.what != self._what:
            self._finish()
            self._what, self._began_s = phase.what, time.monotonic()
            if not self._line.is_live and not self._verbose:
                self._print(text)
        self._line.show(f"flatout: {text}")

    def _finish(self) -> None:
        """Leave a line about the phase that is over."""
        if self._line.is_live and self._what and not self._verbose:
            took = figures.duration(time.monotonic() - self._began_s)
            self._print(f"{self._what} ({took})")
        self._what = ""

    def _print(self, line: str) -> None:
        self._line.clear()
        with contextlib.suppress(OSError):
            print(f"flatout: {printable(line)}", file=self._file, flush=True)


def _pair(phase: Phase) -> str:
    if phase.pair is None:
        return ""
    of_pairs = "" if phase.pairs is None else f" of {phase.pairs}"
    return f": pair {phase.pair}{of_pairs}"


def _left(phase: Phase, seconds: float | None) -> str:
    """How long the phase will take, in words that end a line: about, if the number of its pairs is
    known, else no longer than the budget lasts."""
    if not seconds:
        return ""
    about = "up to" if phase.pairs is None else "about"
    if seconds <= 90:
        return f", {about} {_ROUNDING_S * math.ceil(seconds / _ROUNDING_S)} s left"
    return f", {about} {math.ceil(seconds / 60)} min left"
