"""The journal of a tune: every trial is on disk when it ends, so that a tune can go on later.

A tune has a folder of its own below ``paths.tunes_directory()``::

    journal.jsonl    one JSON object a line: the job, then each trial
    runs/            the run directories of its trials
    result.json      what came out, written at the end

What tune does next depends on nothing but the results of its trials and the time they took. So a
tune that goes on begins anew, and takes each trial that it asks for from the journal as long as
the journal has it; a trial that was running when tune was killed is run again.

A line is written at once and in whole; a torn last line, of a tune that was killed while it wrote,
is ignored and cut off. The file is locked while its tune runs.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flatout import __version__, paths, plan
from flatout.errors import UserError
from flatout.launch.runs import clear_old, new_directory
from flatout.request import Request
from flatout.tune.document import DOCUMENT_FILE

JOURNAL_VERSION = 1
JOURNAL_FILE = "journal.jsonl"
RUNS_FOLDER = "runs"

KEPT_TUNES = 20
KEPT_BYTES = 512 * 2**20
"""What is kept of old tunes; the oldest go first."""


class JournalError(UserError):
    """A journal that cannot be written or read, or that there is none of."""


@dataclass(frozen=True)
class Entry:
    """One trial, as it ended.

    Attributes:
        run: name of its run directory.
        seconds: wall time of its command.
        ended: whether the program came to its end by itself.
        failure: why it gave no usable record, ``None`` if it did.
        tail: the last lines of the program, of a trial that failed.
        spent_s: of the tune until then, all its sittings together.
    """

    run: str
    seconds: float
    ended: bool
    failure: str | None
    tail: str
    spent_s: float


class Journal:
    """The journal of one tune, open and locked.

    Args:
        folder: of the tune, with a journal in it.

    Raises:
        JournalError: it cannot be read or written, or another tune has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL_FILE
        self._descriptor = _locked(self.path)
        lines, whole_bytes = _whole_lines(self.path)
        os.ftruncate(self._descriptor, whole_bytes)
        self.job = lines[0][0] if lines else {}
        self._recorded = [(line, end) for line, end in lines if line.get("kind") == "trial"]
        self._at_byte = lines[0][1] if lines else 0
        self._next = 0
        self._sat_down_s = time.monotonic()
        self._spent_before_s = 0.0

    @property
    def runs(self) -> Path:
        """Where the run directories of its trials are."""
        return self.folder / RUNS_FOLDER

    @property
    def spent_s(self) -> float:
        """How long the tune has taken; while it repeats itself, as long as it had taken then."""
        return self._spent_before_s + (time.monotonic() - self._sat_down_s)

    def recorded(self, *requests: Request) -> tuple[Entry, ...] | None:
        """The next trials, if the journal has them and they were asked the same.

        If it was asked something else, what follows in the journal is dropped: flatout or its
        options are others now.
        """
        if self._next == len(self._recorded):
            return None
        line, end = self._recorded[self._next]
        entries = tuple(Entry(**entry) for entry in line["entries"])
        are_there = all((self.runs / entry.run).is_dir() for entry in entries)
        if line["requests"] != _plain(requests) or not are_there:
            del self._recorded[self._next :]
            os.ftruncate(self._descriptor, self._at_byte)
            return None
        self._next += 1
        self._at_byte = end
        self._spent_before_s = entries[-1].spent_s
        self._sat_down_s = time.monotonic()
        return entries

    def add(self, requests: Sequence[Request], entries: Sequence[Entry]) -> None:
        """Write down trials that have ended at the same time.

        Raises:
            JournalError: it cannot be written.
        """
        document = {
            "kind": "trial",
            "requests": _plain(requests),
            "entries": [dataclasses.asdict(entry) for entry in entries],
        }
        _append(self._descriptor, self.path, document)

    def finish(self, result: str | None = None) -> None:
        """Write down what came out, if anything; there is nothing to resume from now on.

        Raises:
            JournalError: it cannot be written.
        """
        if result is not None:
            partial = self.folder / f"{DOCUMENT_FILE}.partial"
            try:
                partial.write_text(result, "utf-8")
                partial.replace(self.folder / DOCUMENT_FILE)
            except OSError as error:
                raise JournalError(
                    f"{self.folder} cannot be written to: {error.strerror}"
                ) from error
        _append(self._descriptor, self.path, {"kind": "end"})

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


def begin(verb: str, command: Sequence[str]) -> Journal:
    """The journal of a new tune, or of what else a verb tries.

    Raises:
        JournalError: there is no place for it.
    """
    tunes = paths.tunes_directory()
    try:
        tunes.mkdir(parents=True, exist_ok=True)
        clear_old(tunes, KEPT_TUNES, KEPT_BYTES)
        folder = new_directory(tunes)
        (folder / RUNS_FOLDER).mkdir()
        path = folder / JOURNAL_FILE
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise JournalError(
            f"the journal cannot be written to {tunes}: {error.strerror}; "
            "FLATOUT_HOME can name another place"
        ) from error
    try:
        _append(descriptor, path, {"kind": "job", **_job(verb, command)})
    finally:
        os.close(descriptor)
    return Journal(folder)


def resume(verb: str, command: Sequence[str]) -> Journal:
    """The journal of the last tune of this job that has not come to its end.

    Raises:
        JournalError: there is none.
    """
    job = _job(verb, command)
    other: str | None = None
    for path in sorted(paths.tunes_directory().glob(f"*/{JOURNAL_FILE}"), reverse=True):
        lines = read(path)
        if not lines or lines[-1].get("kind") == "end":
            continue
        recorded = lines[0]
        if any(recorded.get(key) != job[key] for key in ("verb", "command", "folder")):
            continue
        changed = [key for key, value in job.items() if recorded.get(key) != value]
        if changed:
            other = other or f"{' and '.join(changed)} changed since"
            continue
        try:
            return Journal(path.parent)
        except BlockingIOError:
            other = other or "it is still running"
    why = f" ({other})" if other else ""
    raise JournalError(f"there is no {verb} of this command to go on with{why}; leave --resume out")


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal.

    Raises:
        JournalError: it cannot be read, or a line but the last is no JSON object.
    """
    return [line for line, _ in _whole_lines(path)[0]]


def _job(verb: str, command: Sequence[str]) -> dict[str, Any]:
    """What must be the same for a tune to go on."""
    return {
        "version": JOURNAL_VERSION,
        "flatout": __version__,
        "verb": verb,
        "command": list(command),
        "folder": os.getcwd(),
        "program": plan.program_sha256(command),
    }


def _plain(requests: Sequence[Request]) -> Any:
    """The requests as they are after a journey through JSON."""
    return json.loads(json.dumps([dataclasses.asdict(request) for request in requests]))


def _locked(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except OSError as error:
        raise JournalError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    return descriptor


def _whole_lines(path: Path) -> tuple[list[tuple[dict[str, Any], int]], int]:
    """The objects of the whole lines, each with the offset of its end; where the last ends."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JournalError(f"{path} cannot be read: {error.strerror}") from error
    lines: list[tuple[dict[str, Any], int]] = []
    end = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        end += len(line)
        try:
            document = json.loads(line)
        except ValueError as error:
            raise JournalError(f"{path} line {number} is not JSON: {error}") from error
        if not isinstance(document, dict):
            raise JournalError(f"{path} line {number} is not a JSON object")
        lines.append((document, end))
    return lines, end


def _append(descriptor: int, path: Path, document: dict[str, Any]) -> None:
    data = (json.dumps(document) + "\n").encode()
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError as error:
        raise JournalError(f"{path} cannot be written: {error.strerror}") from error
