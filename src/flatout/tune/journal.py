"""Keeps the journal of a tune: every trial is written to disk when it ends, so a tune can be
resumed.

A tune has a folder of its own below ``paths.tunes_directory()``::

    journal.jsonl    one JSON object a line: the job, its program, each trial, the end
    runs/            the run directories of its trials
    result.json      the result, written at the end

A resumed tune starts from the beginning. As long as the next trial that it chooses is the next one
in the journal, the trial is not run, and its result is taken from the journal. This works because a
tune chooses its next trial mostly by the results of the earlier trials and the time that they took.
The choice also depends on the free memory, the machine's measured peak rates and the cores that may
be used. If these have changed so much that the tune chooses a different trial than the next one in
the journal, the rest of the journal is dropped. A trial that was running when the tune was killed
is not in the journal, and is run again.

If a tune was killed while it wrote a line, the incomplete line is cut off when the tune is resumed.
The file is locked while its tune runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from flatout import __version__, paths
from flatout.errors import UserError
from flatout.launch.runs import clear_old, new_directory
from flatout.plan.program import (
    ArgumentChanges,
    Program,
    argument_changes,
    changes_between,
    summarize,
)
from flatout.text import one_line
from flatout.tune.document import DOCUMENT_FILE
from flatout.wire import codec
from flatout.wire.request import Request

JOURNAL_VERSION = 1
JOURNAL_FILE = "journal.jsonl"
RUNS_FOLDER = "runs"

KEPT_TUNES = 20
KEPT_BYTES = 512 * 2**20
"""Maximum number of old tunes that are kept, and their maximum total size in bytes. The oldest are
deleted first."""


class JournalError(UserError):
    """A journal cannot be written or read, or there is none to resume."""


def _is_folder_name(name: str) -> bool:
    return os.sep not in name and not name.startswith(".")


@dataclass(frozen=True)
class Entry:
    """The result of one trial.

    Attributes:
        run: the name of the trial's run directory.
        seconds: the wall time of the trial's command.
        ended: whether the program came to its end by itself.
        failure: the reason why the trial gave no usable record; ``None`` if it gave one.
        tail: the last lines of the program's output if the trial failed, otherwise empty.
        spent_s: the time that the tune had taken when the trial ended, in seconds. It includes the
            time before a resume.
    """

    run: Annotated[str, codec.Constraint(_is_folder_name, "the name of a folder")]
    seconds: float
    ended: bool
    failure: str | None
    tail: str
    spent_s: float


@dataclass(frozen=True)
class _TrialLine:
    """One line of the journal: the results of trials that ran together."""

    entries: tuple[Entry, ...]


class Journal:
    """The journal of one tune, open and locked.

    Args:
        folder: the folder of the tune, with a journal in it.

    Raises:
        JournalError: the journal cannot be read or written.
        BlockingIOError: another process has locked the journal.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / JOURNAL_FILE
        self._descriptor = _open_and_lock(self.path)
        try:
            lines, whole_bytes = _read_whole_lines(self.path)
        except JournalError:
            os.close(self._descriptor)
            raise
        os.ftruncate(self._descriptor, whole_bytes)
        self.job = lines[0][0] if lines else {}
        self._program: Program | None = None
        self._program_end = 0
        for line, end in lines:
            if line.get("kind") == "program":
                self._program, self._program_end = _decode_program(line), end
        self._recorded = [(line, end) for line, end in lines if line.get("kind") == "trial"]
        self._at_byte = lines[0][1] if lines else 0
        self._next = 0
        self._session_began_s = time.monotonic()
        self._spent_before_s = 0.0

    @property
    def runs(self) -> Path:
        """The folder that holds the run directories of the tune's trials."""
        return self.folder / RUNS_FOLDER

    @property
    def spent_s(self) -> float:
        """The time that the tune has taken so far, in seconds.

        When a trial is taken from the journal, this time is set to the total that was recorded when
        the trial ended. From then on, it advances with the clock.
        """
        return self._spent_before_s + (time.monotonic() - self._session_began_s)

    @property
    def counted_s(self) -> float:
        """The time that the tune had taken when the last trial ended, in seconds.

        Decisions are made with this time, not with ``spent_s``, so that they are the same when the
        tune is resumed.
        """
        return self._spent_before_s

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        """A context whose duration does not count as time of the tune, for work that is done once
        on a machine, for all tunes."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._session_began_s += time.monotonic() - began_s

    def take_next(self, *requests: Request) -> tuple[Entry, ...] | None:
        """Return the results of the next trials if the journal has them, otherwise ``None``.

        If the next trials in the journal had different requests, the tune has decided differently
        this time. In this case, or if their run directories are gone, the rest of the journal is
        dropped.

        Args:
            requests: the requests of the next trials.

        Raises:
            JournalError: the next line of the journal is not a valid trial.
        """
        if self._next == len(self._recorded):
            return None
        line, end = self._recorded[self._next]
        try:
            entries = codec.decode(_TrialLine, line).entries
        except codec.MismatchError as mismatch:
            why = one_line(mismatch)
            raise JournalError(f"{self.path} holds an invalid trial: {why}") from mismatch
        are_there = all((self.runs / entry.run).is_dir() for entry in entries)
        is_same = line.get("requests") == codec.encode(requests) and len(entries) == len(requests)
        if not is_same or not are_there:
            del self._recorded[self._next :]
            os.ftruncate(self._descriptor, self._at_byte)
            if self._program_end > self._at_byte:
                self._program = None
            return None
        self._next += 1
        self._at_byte = end
        self._spent_before_s = entries[-1].spent_s
        self._session_began_s = time.monotonic()
        return entries

    def add(self, requests: Sequence[Request], entries: Sequence[Entry]) -> None:
        """Write the results of trials that ran together.

        Raises:
            JournalError: the journal cannot be written.
        """
        document = {
            "kind": "trial",
            "requests": codec.encode(requests),
            "entries": codec.encode(entries),
        }
        _append(self._descriptor, self.path, document)
        self._spent_before_s = entries[-1].spent_s
        self._session_began_s = time.monotonic()

    def record_or_check_program(self, program: Program) -> None:
        """Record the program; on resuming, check that it is still the program of the journal.

        Raises:
            JournalError: the program has changed, or the journal cannot be written.
        """
        if self._program is None:
            self._program = program
            line = {"kind": "program", **codec.encode(program)}
            _append(self._descriptor, self.path, line)
            return
        changes = changes_between(self._program, program)
        if changes:
            raise JournalError(
                f"the program has changed since the tune began: {summarize(changes)}; "
                "leave --resume out"
            )
        self._at_byte = max(self._at_byte, self._program_end)

    def finish(self, result: str | None = None) -> None:
        """Write the result, if there is one, and end the journal. After that, the tune cannot be
        resumed.

        Raises:
            JournalError: the journal or the result cannot be written.
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
        """Close and unlock the file."""
        os.close(self._descriptor)


def open_journal(
    verb: str,
    command: Sequence[str],
    options: Any,
    resumes: bool,
    print_line: Callable[[str], None],
) -> Journal:
    """Open the journal of a verb that runs trials.

    Args:
        verb: the name of the verb.
        command: the command line of the job.
        options: the user's options, as a dataclass. On resuming, the options that differ from those
            of the journal are printed.
        resumes: whether to resume the last unfinished tune of this job.
        print_line: prints a line of progress.

    Raises:
        JournalError: the journal cannot be written, or there is no tune to resume.
    """
    if not resumes:
        return begin(verb, command, options)
    found = resume(verb, command)
    differing = _describe_changed_options(found.job.get("options"), _plain_options(options))
    if differing:
        print_line(
            f"resuming with different options: {'; '.join(differing)}; the first trial that "
            "these options change, and all trials after it, run again"
        )
    return found


def begin(verb: str, command: Sequence[str], options: Any = None) -> Journal:
    """Create the journal of a new tune; see ``open_journal``.

    Raises:
        JournalError: the journal cannot be written.
    """
    tunes = paths.tunes_directory()
    try:
        tunes.mkdir(parents=True, exist_ok=True)
        clear_old(tunes, KEPT_TUNES, KEPT_BYTES, is_in_use=_is_locked)
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
        job = {"kind": "job", **_describe_job(verb, command), "options": _plain_options(options)}
        _append(descriptor, path, job)
    finally:
        os.close(descriptor)
    return Journal(folder)


def resume(verb: str, command: Sequence[str]) -> Journal:
    """Open the journal of the last tune of this job that can be continued.

    Raises:
        JournalError: there is no such tune. Each tune has come to its end, has a different command,
            folder or version of flatout, is still running, or has a journal that cannot be read.
    """
    why: list[str] = []
    for path in sorted(paths.tunes_directory().glob(f"*/{JOURNAL_FILE}"), reverse=True):
        try:
            lines = read(path)
            if not lines or lines[0].get("verb") != verb or lines[-1].get("kind") == "end":
                continue
            difference = _explain_no_resume(lines[0], verb, command)
            if difference is None:
                return Journal(path.parent)
        except BlockingIOError:
            difference = "it is still running"
        except JournalError as error:
            difference = str(error)
        why.append(difference)
    if why:
        reason = f"no {verb} of this command can be resumed (the latest unfinished one: {why[0]})"
    else:
        reason = f"no {verb} has been interrupted"
    raise JournalError(f"{reason}; leave --resume out")


def format_resume_command(verb: str, options: Sequence[str], command: Sequence[str]) -> str:
    """Return the command that resumes a verb, quoted for a shell.

    This command repeats the options, because with different options the verb would run different
    trials.

    Args:
        verb: the name of the verb.
        options: the options of the verb, as words of the command line.
        command: the command line of the job.
    """
    others = [word for word in options if word != "--resume"]
    return shlex.join(["flatout", verb, "--resume", *others, "--", *command])


def _explain_no_resume(job: dict[str, Any], verb: str, command: Sequence[str]) -> str | None:
    """Return the reason why the tune of a job cannot be resumed for this command, as a clause.

    The result is ``None`` if the tune can be resumed.

    Args:
        job: the journal's line about the job.
        verb: the name of the verb that resumes.
        command: the command line that the verb was given.
    """
    now = _describe_job(verb, command)
    if job.get("folder") != now["folder"]:
        return f"it was started in {job.get('folder')}"
    if job.get("command") != now["command"]:
        words = job.get("command")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            return "its command cannot be read"
        changes = argument_changes(words, None, command)
        if changes != ArgumentChanges():
            return summarize((*changes.others, *changes.covered))
    changed = [
        f"{key} was {job.get(key)}, is {now[key]}"
        for key in ("version", "flatout")
        if job.get(key) != now[key]
    ]
    return "; ".join(changed) or None


def _describe_changed_options(before: Any, now: dict[str, Any]) -> list[str]:
    """Return a clause for each option that has changed, as far as the old options are known."""
    if not isinstance(before, dict):
        return []
    return [
        f"{name} was {one_line(before[name])}, is {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def _plain_options(options: Any) -> dict[str, Any]:
    """Return the options of a verb by their names on the command line."""
    if options is None:
        return {}
    plain: dict[str, Any] = json.loads(json.dumps(codec.encode(options), default=sorted))
    if "isolate" in plain:
        plain["in-place"] = not plain.pop("isolate")
    return {f"--{name.partition('_')[0]}": value for name, value in plain.items()}


def read(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a journal.

    Raises:
        JournalError: the journal cannot be read, or one of its complete lines is not a JSON object.
    """
    return [line for line, _ in _read_whole_lines(path)[0]]


def _describe_job(verb: str, command: Sequence[str]) -> dict[str, Any]:
    """Describe what must be the same, besides the program, for a tune to be resumed."""
    return {
        "version": JOURNAL_VERSION,
        "flatout": __version__,
        "verb": verb,
        "command": list(command),
        "folder": os.getcwd(),
    }


def _decode_program(line: dict[str, Any]) -> Program | None:
    """Decode the program of a journal's line; ``None`` if it cannot be decoded."""
    try:
        return codec.decode(Program, line)
    except codec.MismatchError:
        return None


def _open_and_lock(path: Path) -> int:
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


def _is_locked(folder: Path) -> bool:
    """Return whether any process runs a tune in this folder."""
    try:
        os.close(_open_and_lock(folder / JOURNAL_FILE))
    except BlockingIOError:
        return True
    except JournalError:
        pass  # there is no journal
    return False


def _read_whole_lines(path: Path) -> tuple[list[tuple[dict[str, Any], int]], int]:
    """Read the objects of the complete lines, each with the byte offset of its end.

    The second result is the byte offset of the end of the last complete line.
    """
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
        except (ValueError, RecursionError) as error:
            raise JournalError(f"{path} line {number} is not JSON: {one_line(error)}") from error
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
