"""Standard output and error of flatout's own process: they may be closed, full, or read by nobody.

What flatout says of a run goes to stderr and must never decide how the run ends: where it cannot be
written it is lost without a word, and nothing of it stays in a buffer that Python would write at
the exit (which would then end with status 120). What a user has asked for goes to stdout, and that
it cannot be written is an error.
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


class BrokenOutputError(UserError):
    """Nobody reads standard output any more; the status is what a shell shows of a program that
    ``SIGPIPE`` has ended."""

    def __init__(self) -> None:
        super().__init__("nobody reads standard output any more", 141)


class _Stream(io.TextIOBase):
    """Stands for a standard stream; ``None``, which Python makes of a closed one, loses all."""

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
    """Loses what cannot be written."""

    def write(self, text: str) -> int:
        if self._stream is None:
            return len(text)
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # no file, as where a test looks on
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
    """Raises ``UserError`` where it cannot be written, ``BrokenOutputError`` for a pipe."""

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
        """Let what is left in buffers go nowhere, as Python's manual has it for broken pipes
        (https://docs.python.org/3/library/signal.html#note-on-sigpipe)."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
        self._stream = None


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Put them in the place of ``sys.stdout`` and ``sys.stderr``."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stdout(sys.stdout), _Stderr(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
