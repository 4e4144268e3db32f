"""Standard output and error of flatout's own process, which may be closed, full, or read by nobody.

What flatout says about a run goes to stderr and must never decide how the run ends. If it cannot be
written, it is lost silently, and no buffer keeps it: Python would write the buffer at its exit and
then end with status 120. What a user asked for goes to stdout; a failure to write it is an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from flatout.errors import UserError
from flatout.text import printable


class BrokenOutputError(UserError):
    """Nobody reads standard output any more. The exit status is that of a program that ``SIGPIPE``
    killed, as a shell reports it."""

    def __init__(self) -> None:
        super().__init__("nobody reads standard output any more", 141)


class _Stream(io.TextIOBase):
    """Replaces a standard stream. A closed one, for which Python has ``None``, loses all text."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        return True


class _Stderr(_Stream):
    """Drops what cannot be written."""

    def write(self, text: str) -> int:
        if self._stream is None:
            return len(text)
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # the stream has no file, as in a test that captures it
            return self._stream.write(text)
        left = text.encode(self.encoding, "backslashreplace")
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
            while left:
                left = left[os.write(descriptor, left) :]
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError, ValueError):
                self._stream.flush()


class _Stdout(_Stream):
    """Raises ``UserError`` if it cannot be written, ``BrokenOutputError`` if a pipe is broken."""

    def write(self, text: str) -> int:
        return int(self._checked("write", text)) if self._stream is not None else len(text)

    def flush(self) -> None:
        if self._stream is not None:
            self._checked("flush")

    def _checked(self, name: str, *args: Any) -> Any:
        try:
            return getattr(self._stream, name)(*args)
        except OSError as error:
            self._discard()
            if error.errno == errno.EPIPE:
                raise BrokenOutputError from None
            why = f"standard output cannot be written: {error.strerror}"
            raise UserError(why, 1) from None

    def _discard(self) -> None:
        """Send what is left in buffers to the null device, as Python's manual does for broken pipes
        (https://docs.python.org/3/library/signal.html#note-on-sigpipe)."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        self._stream = None


def say(line: str) -> None:
    """Print a line of flatout's own on standard error."""
    print(f"flatout: {printable(line)}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Replace ``sys.stdout`` and ``sys.stderr`` inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stdout(sys.stdout), _Stderr(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
