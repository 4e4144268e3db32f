"""The event log: what flatout did in a process, and what it left alone, each with its reason."""

from __future__ import annotations

import functools
import time
import traceback

from flatout.intercept.containment import Failed
from flatout.wire.lines import EVENTS, Event
from flatout.wire.writer import RecordWriter


class EventLog:
    """The ``event`` lines of a record.

    Args:
        record: of this process.
    """

    def __init__(self, record: RecordWriter) -> None:
        self._record = record

    def add(self, what: str, subject: str, why: str, traceback: str | None = None) -> None:
        """Add an event.

        Args:
            what: one of ``lines.EVENTS``.
            subject: what it is about (a knob, ``"profile"``, ...).
            why: one sentence.
            traceback: for failures.
        """
        assert what in EVENTS
        at_s = round(self._record.seconds(time.perf_counter_ns()), 6)
        self._record.write(Event(at_s, what, subject, why, traceback))

    def failed(self, subject: str, error: Exception, what: str = "") -> None:
        """Add a failure of ours, with its traceback.

        Args:
            subject: what has failed.
            error: how.
            what: put before the error.
        """
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.add("failed", subject, f"{what}{type(error).__name__}: {error}", trace)

    def fails(self, subject: str) -> Failed:
        """``failed`` of a subject, for ``containment``."""
        return functools.partial(self.failed, subject)
