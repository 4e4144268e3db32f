"""The writer of a run record; the agent loads it inside the user's program.

A record is written in whole lines, about every ``FLUSH_SECONDS``, so that the record of a killed
run is readable.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from array import array
from pathlib import Path
from typing import Any

from flatout.wire import codec
from flatout.wire.header import Header
from flatout.wire.lines import Line, Losses, PackedTrace

FLUSH_SECONDS = 0.25

_INCOMPLETE = "incomplete"
_MOST_DIGITS = 5
"""More digits than an error number has."""


class RecordWriter:
    """Appends lines to the record file of one process.

    The file is created with the first flush, so a process that records nothing leaves nothing. An
    existing file (a process that replaced itself by ``exec`` keeps its pid) is appended to, with a
    header of its own. When writing fails (full disk, read-only folder), nothing more is written,
    and ``reason_record_incomplete`` of the run tells why.

    Args:
        run_directory: the directory of the run.
        pid: of this process.
    """

    def __init__(self, run_directory: Path, pid: int) -> None:
        self._run_directory = run_directory
        self.restart(pid)

    def restart(self, pid: int) -> None:
        """Begin anew as the record of the process ``pid``, which a fork has made."""
        self.path = record_path(self._run_directory, pid)
        self.started_ns = time.perf_counter_ns()
        self._pid = pid
        self._lines: list[str] = []
        self._flushed_ns = self.started_ns
        self._broken = False

    def begin(self, header: Header) -> None:
        """Queue the header before everything that is queued already."""
        self._lines.insert(0, _text(header))

    def write(self, line: Line) -> None:
        """Queue a line; it reaches the file with the next flush."""
        self._lines.append(_text(line))

    def write_events(self, packed: bytes) -> None:
        """Queue the events that the log has packed, if there are any."""
        if packed:
            self.write(PackedTrace(packed))

    def write_losses(self, losses: list[float], peak_device_bytes: int | None) -> None:
        """Queue the losses that have arrived."""
        self.write(Losses(array("d", losses), peak_device_bytes))

    def seconds(self, at_ns: int) -> float:
        """Seconds between the header and a ``time.perf_counter_ns`` reading."""
        return (at_ns - self.started_ns) / 1e9

    def is_due(self) -> bool:
        """Whether ``FLUSH_SECONDS`` have passed since the last flush."""
        return time.perf_counter_ns() - self._flushed_ns > FLUSH_SECONDS * 1e9

    def flush(self) -> None:
        """Append the queued lines in one write."""
        self._flushed_ns = time.perf_counter_ns()
        lines, self._lines = self._lines, []
        if self._broken or not lines:
            return
        data = "".join(lines).encode("utf-8", "backslashreplace")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        try:
            # The file is not kept open: a program that closes descriptors it does not know (a
            # daemon does) would get the same number for a file of its own, with the record in it.
            descriptor = os.open(self.path, flags, 0o644)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self._broken = True
            self._leave_note(error)

    def _leave_note(self, error: OSError) -> None:
        """Leave an empty file for ``reason_record_incomplete``; a full disk still takes one."""
        note = self.path.with_name(f"{_INCOMPLETE}-{self._pid}-{error.errno}")
        try:
            os.close(os.open(note, os.O_WRONLY | os.O_CREAT, 0o644))
        except OSError:
            with contextlib.suppress(OSError):
                os.write(2, f"flatout: the record stops, the program goes on: {error}\n".encode())

    def close(self) -> None:
        """Flush for the last time."""
        self.flush()


def record_path(run_directory: Path, pid: int) -> Path:
    """Path of the record file of the process ``pid``."""
    return run_directory / f"record-{pid}.jsonl"


def reason_record_incomplete(run_directory: Path) -> str | None:
    """Why a process could not write its record to the end; ``None``: all could."""
    for note in sorted(run_directory.glob(f"{_INCOMPLETE}-*-*")):
        number = note.name.rpartition("-")[2]
        if number.isdecimal() and len(number) <= _MOST_DIGITS:
            return os.strerror(int(number))
    return None


def _text(line: Line) -> str:
    document: dict[str, Any] = {"kind": line.kind, **codec.encode(line)}
    return json.dumps(document, default=repr) + "\n"
