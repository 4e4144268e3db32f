"""The writer of a run record; the agent loads it inside the user's program.

A record is written in complete lines, about every ``FLUSH_SECONDS``, so that the record of a killed
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
"""Longer numbers are not error numbers, and ``os.strerror`` would overflow."""


class RecordWriter:
    """Appends lines to the record file of one process.

    The file is created with the first flush, so a process that records nothing leaves no file. If
    the file exists (a process that replaced itself by ``exec`` keeps its pid), the lines are
    appended to it, after a header of their own. If writing fails (full disk, read-only folder),
    nothing more is written, and ``reason_record_incomplete`` returns the reason.

    Args:
        run_directory: the directory of the run.
        pid: the id of this process.
    """

    def __init__(self, run_directory: Path, pid: int) -> None:
        self._run_directory = run_directory
        self.restart(pid)

    def restart(self, pid: int) -> None:
        """Discard the queued lines and start the record of the process ``pid``, the child of a
        fork."""
        self.path = record_path(self._run_directory, pid)
        self.started_ns = time.perf_counter_ns()
        self._pid = pid
        self._lines: list[str] = []
        self._flushed_ns = self.started_ns
        self._broken = False

    def begin(self, header: Header) -> None:
        """Queue the header in front of the lines that are queued already."""
        self._lines.insert(0, _to_json_line(header))

    def write(self, line: Line) -> None:
        """Queue a line; it reaches the file with the next flush."""
        self._lines.append(_to_json_line(line))

    def write_events(self, packed: bytes) -> None:
        """Queue packed events, if there are any."""
        if packed:
            self.write(PackedTrace(packed))

    def write_losses(self, losses: list[float], peak_device_bytes: int | None) -> None:
        """Queue the losses that have arrived."""
        self.write(Losses(array("d", losses), peak_device_bytes))

    def seconds(self, at_ns: int) -> float:
        """Return the seconds between the header and a ``time.perf_counter_ns`` reading."""
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
            # The file is not kept open: a program that closes unknown descriptors, as daemons do,
            # could reopen the same descriptor number for its own file, and the record would be
            # written into that file.
            descriptor = os.open(self.path, flags, 0o644)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self._broken = True
            self._create_incomplete_file(error)

    def _create_incomplete_file(self, error: OSError) -> None:
        """Create the empty file for ``reason_record_incomplete``, which needs no disk space."""
        path = self.path.with_name(f"{_INCOMPLETE}-{self._pid}-{error.errno}")
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
        except OSError:
            with contextlib.suppress(OSError):
                os.write(2, f"flatout: the record stops, the program goes on: {error}\n".encode())


def record_path(run_directory: Path, pid: int) -> Path:
    """Return the path of the record file of the process ``pid``."""
    return run_directory / f"record-{pid}.jsonl"


def reason_record_incomplete(run_directory: Path) -> str | None:
    """Return the reason why a process could not write its complete record; ``None`` if all
    could."""
    for path in sorted(run_directory.glob(f"{_INCOMPLETE}-*-*")):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and len(number) <= _MOST_DIGITS:
            return os.strerror(int(number))
    return None


def _to_json_line(line: Line) -> str:
    document: dict[str, Any] = {"kind": line.kind, **codec.encode(line)}
    return json.dumps(document, default=repr) + "\n"
