"""Ending a rank: with one sentence if the ranks have parted, and without a trace at its exit."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from flatout.intercept.events import EventLog
from flatout.parallel.place import Place

NEWS_SECONDS = 3.0
"""How long a rank that has lost another waits to learn why."""


class PartedError(Exception):
    """The ranks cannot go on together, and rank 0, which raises this, goes on alone."""


class Ending:
    """Stops this process.

    Args:
        place: of this process.
        events: where the reason is noted.
        finish: writes the rest of the record.
        goes_alone: see ``wire.request.Ranks``.
        state: returns a digest of what the ranks have computed together and the program keeps; an
            empty string while that is nothing.

    Attributes:
        is_stopping: whether this process is being stopped.
        ticket: of this process (see ``joining``); ``None``: it has none yet.
    """

    def __init__(
        self,
        place: Place,
        events: EventLog,
        finish: Callable[[str], None],
        goes_alone: bool = False,
        state: Callable[[], str] = str,
    ) -> None:
        self.is_stopping = False
        self.ticket: int | None = None
        self._place = place
        self._events = events
        self._finish = finish
        self._goes_alone = goes_alone
        self._state = state
        self._is_between_calls = False

    @contextlib.contextmanager
    def between_calls(self) -> Iterator[None]:
        """A context in which nothing is computed half, so that rank 0 may go on alone."""
        self._is_between_calls = True
        try:
            yield
        finally:
            self._is_between_calls = False

    def part(
        self, sentence: str, rank_0_is_between_calls: bool, exchange: Callable[[bytes], list[bytes]]
    ) -> NoReturn:
        """End what the ranks do together, where all of them have met and found a difference.

        Rank 0 goes on alone if it may, and if the states of all ranks are the same: they show that
        what was computed together was computed from the same.

        Args:
            sentence: what differs.
            rank_0_is_between_calls: whether rank 0 has met the others between two calls.
            exchange: returns the messages of all ranks.

        Raises:
            PartedError: this is rank 0, and it goes on alone.
        """
        if self._goes_alone and rank_0_is_between_calls:
            states = exchange(self._state().encode())
            if all(state == states[0] for state in states):
                self._let_rank_0_go_on(sentence)
            sentence += "; what the ranks have computed together differs too"
        self._stop(sentence)

    def stop(self, sentence: str) -> NoReturn:
        """End the process with exit status 1, or go on alone.

        Args:
            sentence: the reason, printed on stderr.

        Raises:
            PartedError: this is rank 0, and it goes on alone.
        """
        if self._goes_alone and self._is_between_calls:
            self._let_rank_0_go_on(sentence)
        self._stop(sentence)

    def _let_rank_0_go_on(self, sentence: str) -> NoReturn:
        if self._place.rank == 0:
            raise PartedError(sentence)
        self.leave()

    def _stop(self, sentence: str) -> NoReturn:
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
        """Stop because of a failure of flatout itself."""
        self._events.add_failure("ranks", error)
        self.stop(f"--ranks has failed: {type(error).__name__}: {error}")

    def lost(self, error: Exception) -> NoReturn:
        """Stop because another rank does not answer."""
        deadline = time.monotonic() + NEWS_SECONDS
        while True:
            if self._alone_file().exists():
                self.leave()
            sentence = self.news()
            if sentence is not None or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        ended = [rank for rank in self._others() if self._end_file(rank).exists()]
        sentence = sentence or self._parting()
        if sentence is None:
            first_line = next(iter(str(error).splitlines()), "")
            sentence = f"the connection to the other ranks is lost: {first_line}"
        if self._goes_alone and 0 in ended:
            self.leave()
        if self._goes_alone and not self._are_in_this_state(ended):
            self._stop(sentence)
        self.stop(sentence)

    def leave(self) -> NoReturn:
        """End the process, which is a companion, because rank 0 goes on alone, or ends."""
        self.is_stopping = True
        _flush()
        why = _read(self._alone_file())
        self._events.add("stopped", "ranks", f"rank 0 goes on alone: {why or 'it ends'}")
        self._finish("stopped")
        os._exit(0)

    def note_alone(self, why: str) -> None:
        """Let the other ranks know that this one needs them no longer, and why."""
        with contextlib.suppress(OSError):
            new = self._alone_file().with_suffix(".new")
            new.write_text(why, "utf-8")
            new.replace(self._alone_file())

    def note_end(self) -> None:
        """Let the other ranks know that the program has ended in this one, and in which state."""
        with contextlib.suppress(OSError):
            new = self._end_file(self._place.rank).with_suffix(".new")
            new.write_text(self._state() if self._goes_alone else "")
            new.replace(self._end_file(self._place.rank))

    def news(self) -> str | None:
        """Return how another rank has failed, ``None`` if none has."""
        for rank in self._others():
            if (text := _read(self._place.run_directory / f"died-{rank}")) is not None:
                return f"rank {rank} has ended: {text}" if text else f"rank {rank} has ended"
        return None

    def _parting(self) -> str | None:
        """Return that the program has ended on another rank without a failure, if it has."""
        for rank in self._others():
            if self.ticket is not None and self._end_file(rank).exists():
                return (
                    f"the program has ended on rank {rank} and goes on on rank {self._place.rank}: "
                    "it decides by something that is not the same on all ranks, such as the clock"
                )
        return None

    def absence(self) -> str | None:
        """Return why another rank does not come to join this one, ``None`` if it still may. End the
        process if rank 0 does without it."""
        if self._place.rank and self._alone_file().exists():
            self.leave()
        for rank in self._others():
            if (self._place.run_directory / f"gone-{rank}").exists():
                return f"the program has ended on rank {rank} and has called no module there"
        return self.news()

    def _are_in_this_state(self, ended: Sequence[int]) -> bool:
        """Whether ranks have ended with what this one has computed together with them."""
        return all(_read(self._end_file(rank)) == self._state() for rank in ended)

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
