"""The event log: each thing that flatout did or left alone in a process, with the reason."""

from __future__ import annotations

import functools
import time
import traceback

from flatout.intercept.containment import OnFailure
from flatout.wire.lines import AGENT_EVENT_KINDS, AgentEvent
from flatout.wire.writer import RecordWriter


class EventLog:
    """The ``event`` lines of a record.

    Args:
        record: the record of this process.
    """

    def __init__(self, record: RecordWriter) -> None:
        self._record = record

    def add(self, what: str, subject: str, why: str, traceback: str | None = None) -> None:
        """Add an event.

        Args:
            what: one of ``lines.AGENT_EVENT_KINDS``.
            subject: what the event is about: a knob, ``KNOB=SETTING`` or a part of flatout.
            why: the reason, in one sentence.
            traceback: the traceback of the exception, if a failure caused the event.
        """
        assert what in AGENT_EVENT_KINDS
        at_s = round(self._record.seconds(time.perf_counter_ns()), 6)
        self._record.write(AgentEvent(at_s, what, subject, why, traceback))

    def add_failure(self, subject: str, error: Exception, prefix: str = "") -> None:
        """Add a failure of flatout, with its traceback.

        Args:
            subject: the knob or the part of flatout that has failed.
            error: the exception that it raised.
            prefix: text before the error.
        """
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self.add("failed", subject, f"{prefix}{type(error).__name__}: {error}", trace)

    def on_failure_of(self, subject: str) -> OnFailure:
        """Return the callback that adds the failures of a subject, for ``containment``."""
        return functools.partial(self.add_failure, subject)
