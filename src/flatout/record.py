"""The run record: what one run of a job left behind. Format, writer and reader, in this one file.

A run has a directory, named by the environment variable ``FLATOUT_RUN``::

    request.json            what the agent was asked to do (see ``request.py``)
    record-PID.jsonl        one file for each process whose agent had something to record

A record file is append-only JSON Lines: one object a line, each with a ``kind``. It is written at
step boundaries, at the latest every ``FLUSH_SECONDS``, in whole lines, so a killed run is readable;
a torn last line is ignored by the reader. Times are in the unit their name ends with, ``at_s`` is
seconds since the header was written. What was not measured is ``null``, never 0.

Format version 1:

``header``
    First line. ``version``, ``pid``, ``parent_pid``, ``rank`` and ``world_size`` (null outside a
    distributed job), ``started_unix_s``, ``program`` (base name only), ``executable``, ``python``,
    ``torch``, ``threads`` (torch's intra-op threads), ``cpu_capability``, ``accelerator`` (device
    type or null), ``environment`` (only the variables in ``ENVIRONMENT_NAMES``).
``turns``
    ``rows``: turns in the order in which they ended, each a list in the order of ``COLUMNS``:
    ``evaluation`` (1: a pass forward that no backward follows, which is a step of an evaluation
    pass or, in a run without training, of the inference loop; 0: one turn of the training loop),
    ``index`` (from 0, among its kind), ``start_ns`` and ``end_ns`` (since the header), the phases
    in the order of ``PHASES`` as ``data_ns`` ..., ``losses`` (one for each backward call that
    started from a single scalar, in order; null where it could not be read), ``forwards``,
    ``backwards``, ``updates`` (optimizer steps), ``minor_faults``, ``major_faults``,
    ``peak_rss_bytes`` (of the process, so far), ``peak_device_bytes``, ``arm`` (index into the
    request's arms, null outside a comparison), ``mark`` (null, ``"switched"`` for a turn left out
    after a switch, ``"profiled"`` for one slowed down by the profiler or the FLOP counter),
    ``grad`` (1 when autograd recorded a forward call).
``event``
    What the agent did, skipped or failed to do: ``at_s``, ``what`` (one of ``EVENTS``),
    ``subject``, ``why``, ``traceback`` (string or null).
``profile``
    Aggregates of the profiled window, see ``agent/profile.py``.
``end``
    Last line of a process that ended in an orderly way: ``at_s``, ``reason`` (``exit`` or
    ``stopped``).

Only the standard library is imported: the agent loads this file inside the user's program.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD_VERSION = 1
FLUSH_SECONDS = 0.25

PHASES = ("data", "transfer", "forward", "loss", "backward", "optimizer", "other")
EVENTS = ("applied", "undone", "skipped", "failed", "noticed", "stopped")

COLUMNS = (
    "evaluation",
    "index",
    "start_ns",
    "end_ns",
    *(f"{phase}_ns" for phase in PHASES),
    "losses",
    "forwards",
    "backwards",
    "updates",
    "minor_faults",
    "major_faults",
    "peak_rss_bytes",
    "peak_device_bytes",
    "arm",
    "mark",
    "grad",
)

ENVIRONMENT_NAMES = (
    "CUDA_VISIBLE_DEVICES",
    "GLIBC_TUNABLES",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MALLOC_ARENA_MAX",
    "MALLOC_CONF",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "OMP_WAIT_POLICY",
    "OPENBLAS_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "RANK",
    "THP_MEM_ALLOC_ENABLE",
    "TORCH_DISTRIBUTED_DEBUG",
    "WORLD_SIZE",
)


class RecordError(ValueError):
    """A record that cannot be read: missing, of another version, or not a record at all."""


class RecordWriter:
    """Appends lines to one record file; turns itself off, once and audibly, when it cannot.

    The file is created with the first flush, so a process that records nothing leaves nothing.

    Args:
        path: the record file; an existing file (a process that replaced itself by ``exec`` keeps
            its pid) is appended to, its header line repeated.
        on_failure: called once with the error when writing fails (full disk, read-only folder).
    """

    def __init__(self, path: Path, on_failure: Callable[[OSError], None]) -> None:
        self.path = path
        self.started_ns = time.perf_counter_ns()
        self._on_failure = on_failure
        self._lines: list[str] = []
        self._rows: list[list[Any]] = []
        self._flushed_ns = self.started_ns
        self.broken = False

    def write(self, document: dict[str, Any]) -> None:
        """Queue one object; it reaches the file with the next flush."""
        self._end_rows()
        self._lines.append(json.dumps(document, default=repr) + "\n")

    def write_turn(self, row: list[Any]) -> None:
        """Queue one turn, a list in the order of ``COLUMNS``.

        Turns are encoded together when they are flushed: encoding them one by one would cost more
        than watching them.
        """
        self._rows.append(row)

    def _end_rows(self) -> None:
        if self._rows:
            rows, self._rows = self._rows, []
            self._lines.append(json.dumps({"kind": "turns", "rows": rows}) + "\n")

    def seconds(self, at_ns: int) -> float:
        """Seconds between the header and a ``time.perf_counter_ns`` reading."""
        return (at_ns - self.started_ns) / 1e9

    def flush_if_due(self, now_ns: int) -> None:
        """Flush when ``FLUSH_SECONDS`` have passed since the last time."""
        if now_ns - self._flushed_ns > FLUSH_SECONDS * 1e9:
            self.flush()

    def flush(self) -> None:
        """Append the queued lines in one write."""
        self._flushed_ns = time.perf_counter_ns()
        self._end_rows()
        lines, self._lines = self._lines, []
        if self.broken or not lines:
            return
        data = "".join(lines).encode("utf-8", "backslashreplace")
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        try:
            # Not kept open: a program that closes descriptors it does not know (a daemon does)
            # would get the same number for a file of its own, and the record in it.
            descriptor = os.open(self.path, flags, 0o644)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self.broken = True
            self._on_failure(error)

    def close(self) -> None:
        """The last flush."""
        self.flush()


@dataclass(frozen=True)
class Step:
    """A row of ``turns``, in seconds and milliseconds; see the format above for the fields."""

    index: int
    at_s: float
    step_ms: float
    phases_ms: dict[str, float | None]
    losses: tuple[float | None, ...]
    forwards: int
    backwards: int
    updates: int
    minor_faults: int | None
    major_faults: int | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    arm: int | None
    mark: str | None
    grad: bool


@dataclass(frozen=True)
class Event:
    """An ``event`` line."""

    at_s: float
    what: str
    subject: str
    why: str
    traceback: str | None


@dataclass
class ProcessRecord:
    """Everything that one process recorded."""

    path: Path
    header: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Step] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    profile: dict[str, Any] | None = None
    end: dict[str, Any] | None = None

    @property
    def trains(self) -> bool:
        """Whether the process trained; if not, its steps are those of the inference loop."""
        return bool(self.steps)

    @property
    def turns(self) -> list[Step]:
        """The steps of the program: of its training loop or else of its inference loop."""
        return self.steps if self.trains else self.evaluations


@dataclass
class RunRecord:
    """All processes of one run, the main one first (rank 0, else the one with the most steps)."""

    directory: Path
    processes: list[ProcessRecord]

    @property
    def main(self) -> ProcessRecord | None:
        """The process that the report is about, ``None`` when no agent recorded anything."""
        return self.processes[0] if self.processes else None


def record_path(run_directory: Path, pid: int) -> Path:
    """The record file of the process ``pid``."""
    return run_directory / f"record-{pid}.jsonl"


def read_run(run_directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RecordError: the directory is missing, or a file in it is not a record of this version.
    """
    if not run_directory.is_dir():
        raise RecordError(f"{run_directory} is not a run directory")
    processes = [read_process(path) for path in sorted(run_directory.glob("record-*.jsonl"))]

    def importance(process: ProcessRecord) -> tuple[int, int, int]:
        rank = process.header.get("rank")
        return (len(process.steps), len(process.evaluations), -(rank if rank is not None else 0))

    return RunRecord(run_directory, sorted(processes, key=importance, reverse=True))


def read_process(path: Path) -> ProcessRecord:
    """Read one record file; a torn last line is ignored.

    Raises:
        RecordError: the file cannot be read or is not a record of this version.
    """
    process: ProcessRecord | None = None
    for number, document in _lines(path):
        kind = document.get("kind")
        if kind == "header":
            if document.get("version") != RECORD_VERSION:
                raise RecordError(
                    f"{path} has record version {document.get('version')}, this flatout reads "
                    f"{RECORD_VERSION}"
                )
            process = process or ProcessRecord(path, document)
        elif process is None:
            raise RecordError(f"{path} line {number}: no header comes before it")
        elif kind == "turns":
            for row in document.get("rows", ()):
                evaluation, step = _step(row, path, number)
                (process.evaluations if evaluation else process.steps).append(step)
        elif kind == "event":
            process.events.append(
                Event(*(document.get(k) for k in ("at_s", "what", "subject", "why", "traceback")))  # type: ignore[arg-type]
            )
        elif kind == "profile":
            process.profile = document
        elif kind == "end":
            process.end = document
    if process is None:
        raise RecordError(f"{path} is empty")
    return process


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text("utf-8", "replace").split("\n")
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is torn
        try:
            document = json.loads(line)
        except json.JSONDecodeError as error:
            raise RecordError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(document, dict):
            raise RecordError(f"{path} line {number} is not a JSON object")
        yield number, document


def _step(row: list[Any], path: Path, number: int) -> tuple[bool, Step]:
    """Whether a row is an evaluation, and the row."""
    try:
        value = dict(zip(COLUMNS, row, strict=True))
        phases_ns = {phase: value[f"{phase}_ns"] for phase in PHASES}
        step = Step(
            at_s=value["start_ns"] / 1e9,
            step_ms=(value["end_ns"] - value["start_ns"]) / 1e6,
            phases_ms={phase: None if ns is None else ns / 1e6 for phase, ns in phases_ns.items()},
            losses=tuple(value["losses"]),
            grad=bool(value["grad"]),
            **{
                name: value[name]
                for name in (
                    "index",
                    "forwards",
                    "backwards",
                    "updates",
                    "minor_faults",
                    "major_faults",
                    "peak_rss_bytes",
                    "peak_device_bytes",
                    "arm",
                    "mark",
                )
            },
        )
    except (TypeError, ValueError) as error:
        raise RecordError(f"{path} line {number} has a turn that is not one: {error}") from error
    return bool(value["evaluation"]), step
