"""Ending a rank: with one sentence if the ranks have parted, and without a trace at its exit."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from flatout.intercept.events import EventLog
from flatout.parallel.place import Place

NEWS_SECONDS = 3.0
"""How long a rank that has lost another waits to learn why."""


class Ending:
    """Stops this process.

    Args:
        place: of this process.
        events: where the reason is noted.
        finish: writes the rest of the record.

    Attributes:
        is_stopping: whether this process is being stopped.
        ticket: of this process (see ``joining``); ``None``: it has none yet.
    """

    def __init__(self, place: Place, events: EventLog, finish: Callable[[str], None]) -> None:
        self.is_stopping = False
        self.ticket: int | None = None
        self._place = place
        self._events = events
        self._finish = finish

    def stop(self, sentence: str) -> NoReturn:
        """End the process with exit status 1.

        Args:
            sentence: the reason, printed on stderr.
        """
        self.is_stopping = True
        _flush()
        if sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):
                text = f"flatout: {sentence}\n"
                os.write(sys.__stderr__.fileno(), text.encode("utf-8", "backslashreplace"))
        self._events.add("stopped", "ranks", sentence)
        self._finish("stopped")
        os._exit(1)

    def failed(self, error: Exception) -> NoReturn:
        """Stop because of a failure of flatout itself: to go on alone would be to part."""
        self._events.add_failure("ranks", error)
        self.stop(f"--ranks has failed: {type(error).__name__}: {error}")

    def lost(self, error: Exception) -> NoReturn:
        """Stop because another rank does not answer."""
        deadline = time.monotonic() + NEWS_SECONDS
        while True:
            if (why := _read(self._alone_file())) is not None:
                self._leave(why)
            if (news := self.news()) is not None or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        news = news or self.parting()
        if news is None:
            first_line = next(iter(str(error).splitlines()), "")
            news = f"the connection to the other ranks is lost: {first_line}"
        self.stop(news)

    def _leave(self, why: str) -> NoReturn:
        """End the process because rank 0 goes on alone."""
        self.is_stopping = True
        _flush()
        self._events.add("stopped", "ranks", f"rank 0 goes on alone: {why}")
        self._finish("stopped")
        os._exit(0)

    def note_alone(self, why: str) -> None:
        """Let the other ranks know that this one goes on without them, and why."""
        with contextlib.suppress(OSError):
            new = self._alone_file().with_suffix(".new")
            new.write_text(why, "utf-8")
            new.replace(self._alone_file())

    def note_end(self) -> None:
        """Let the other ranks know that the program has ended in this one."""
        with contextlib.suppress(OSError):
            self._end_file(self._place.rank).touch()

    def news(self) -> str | None:
        """Return how another rank has failed, ``None`` if none has."""
        for rank in self._others():
            if (text := _read(self._place.run_directory / f"died-{rank}")) is not None:
                return f"rank {rank} has ended: {text}" if text else f"rank {rank} has ended"
        return None

    def parting(self) -> str | None:
        """Return that the program has ended on another rank without a failure, if it has."""
        for rank in self._others():
            has_ended = self.ticket is not None and self._end_file(rank).exists()
            # The command of a companion as a whole, which may have made no root call.
            if has_ended or (self._place.run_directory / f"done-{rank}").exists():
                return (
                    f"the program has ended on rank {rank} and goes on on rank {self._place.rank}: "
                    "it decides by something that is not the same on all ranks, such as the clock"
                )
        return None

    def _others(self) -> list[int]:
        return [rank for rank in range(self._place.size) if rank != self._place.rank]

    def _alone_file(self) -> Path:
        return self._place.run_directory / f"alone-{self.ticket}"

    def _end_file(self, rank: int) -> Path:
        return self._place.run_directory / f"ended-{rank}-{self.ticket}"


class Interruption:
    """Notices signals that interrupt the program: only rank 0 gets them, and what it does then the
    others do not.

    It must be made in the main thread, else it notices none.
    """

    def __init__(self) -> None:
        self._has_come = False
        self._reader = self._writer = -1
        if threading.current_thread() is not threading.main_thread():
            return
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        if before != -1:  # the program waits for signals by itself
            signal.set_wakeup_fd(before)

    def has_come(self) -> bool:
        """Whether SIGINT or SIGTERM was handled in Python since this was made."""
        if self._reader != -1 and not self._has_come:
            with contextlib.suppress(BlockingIOError):
                numbers = os.read(self._reader, 65536)
                self._has_come = not {signal.SIGINT, signal.SIGTERM}.isdisjoint(numbers)
        return self._has_come

    def forget(self) -> None:
        """Notice nothing more, in the child of a fork, which shares the pipe with its parent."""
        if self._reader != -1:
            before = signal.set_wakeup_fd(-1)
            if before not in (-1, self._writer):
                signal.set_wakeup_fd(before)
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _read(path: Path) -> str | None:
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return None
    return lines[0] if lines else ""
