"""The run record: what one run of a job left behind. Format, writer and reader, in this one file.

A run has a directory, named by the environment variable ``FLATOUT_RUN``::

    request.json            what the agent was asked to do (see ``wire/request.py``)
    record-PID.jsonl        one file for each process whose agent had something to record
    incomplete-PID-ERRNO    empty: that process could not write its record to the end, and why

A record file is append-only JSON Lines: one object a line, each with a ``kind``. It is written in
whole lines, about every ``FLUSH_SECONDS``, so a killed run is readable; a torn last line is ignored
by the reader. Times are in the unit their name ends with, ``at_s`` is seconds since the header was
written. What was not measured is ``null``, never 0.

Format version 5:

``header``
    First line. ``version``, ``pid``, ``parent_pid``, ``rank`` and ``world_size`` (null outside a
    distributed job), ``started_unix_s``, ``started_ns`` (the same moment on the clock of the
    events), ``program`` (base name only), ``executable``, ``python``, ``torch``, ``threads``
    (torch's intra-op threads), ``cpu_capability``, ``accelerator`` (device type or null),
    ``environment`` (only the variables in ``ENVIRONMENT_NAMES``).
``events``
    ``packed``: what torch did since the line before, in base64. An event (``turns.TorchEvent``) is
    one byte, kind + 4 * phase + 32 * flags, then its values, each as the difference to the last one
    of its kind in the file (times; modules; optimizers; each of the three usages; notes; all from
    0 at a header), zigzag-encoded and in LEB128. What a step is, and its phases, ``wire/turns.py``
    makes of them when the record is read.
``losses``
    ``packed``: the next losses that backward calls started from, in order (an accelerator's arrive
    late), as little-endian float64 in base64; ``peak_device_bytes``: most memory torch had
    allocated on the accelerator so far.
``inputs``
    ``tensors``, the inputs of the first outermost module calls (see ``wire/signature.py``);
    another such line takes its place when later calls differ in sizes.
``modules``
    ``files``, those that the program has imported, outside of the standard library and installed
    packages: written at the first outermost module call, and at the end.
``gradients``, ``outputs``, ``state``
    Where the request asks for an inspection. ``gradients``: ``parameters``, the gradients that one
    update is made from, each with the fields of ``Gradient``. ``outputs``: one pass forward that
    does not train, with the fields of ``Output``. ``state``: ``roots``, the outermost modules at
    the end, each with the fields of ``RootState``. Samples are little-endian float32 (``top1``:
    int32) in base64.
``learned``
    After a comparison in the real training: ``settings``, each with the fields of ``Learned``.
``event``
    What the agent did, skipped or failed to do: ``at_s``, ``what`` (one of ``EVENTS``),
    ``subject``, ``why``, ``traceback`` (string or null).
``profile``
    Aggregates of the profiled window, see ``agent/profile.py``.
``end``
    Last line of a process that ended in an orderly way: ``at_s``, ``reason`` (``exit`` or
    ``stopped``), ``peak_device_bytes`` as above, also where no loss was read.

Only the standard library is imported: the agent loads this file inside the user's program.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import struct
import time
from array import array
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Generic, TypeVar

from flatout.text import one_line, with_printable
from flatout.wire.turns import (
    DATA,
    FORWARD,
    NOTE,
    OPTIMIZER,
    PHASES,
    TRANSFER,
    USAGE,
    TorchEvent,
    Turn,
    Turns,
)

RECORD_VERSION = 5
FLUSH_SECONDS = 0.25

_INCOMPLETE = "incomplete"
_LONGEST_NUMBER = 6

EVENTS = ("applied", "undone", "skipped", "failed", "noticed", "stopped", "unused")

MANY_FAULTS = 256
"""Minor page faults of a step (1 MiB of memory) below which they cannot matter."""

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
    """Appends lines to one process's record file.

    The file is created with the first flush, so a process that records nothing leaves nothing. An
    existing file (a process that replaced itself by ``exec`` keeps its pid) is appended to, its
    header line repeated. When writing fails (full disk, read-only folder), nothing more is written
    and ``write_failure`` of the run says why.

    Args:
        run_directory: the run's.
        pid: of this process.
    """

    def __init__(self, run_directory: Path, pid: int) -> None:
        self._run_directory = run_directory
        self.restart(pid)

    def restart(self, pid: int) -> None:
        """Begin anew, as the record of this process: the child of a fork has another pid."""
        self.path = record_path(self._run_directory, pid)
        self.started_ns = time.perf_counter_ns()
        self._pid = pid
        self._lines: list[str] = []
        self._flushed_ns = self.started_ns
        self._broken = False

    def begin(self, header: dict[str, Any]) -> None:
        """Queue the header, before what is queued already."""
        self._lines.insert(0, _line(header))

    def write(self, document: dict[str, Any]) -> None:
        """Queue one object; it reaches the file with the next flush."""
        self._lines.append(_line(document))

    def write_events(self, packed: bytes) -> None:
        """Queue what the log has packed."""
        if packed:
            self._lines.append(f'{{"kind": "events", "packed": "{_base64(packed)}"}}\n')

    def write_losses(self, losses: list[float], peak_device_bytes: int | None) -> None:
        """Queue the losses that have arrived."""
        packed = _base64(struct.pack(f"<{len(losses)}d", *losses))
        self._lines.append(
            f'{{"kind": "losses", "packed": "{packed}", '
            f'"peak_device_bytes": {json.dumps(peak_device_bytes)}}}\n'
        )

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
            # Not kept open: a program that closes descriptors it does not know (a daemon does)
            # would get the same number for a file of its own, and the record in it.
            descriptor = os.open(self.path, flags, 0o644)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self._broken = True
            self._say(error)

    def _say(self, error: OSError) -> None:
        """Leave a note for ``write_failure``: a full disk still takes an empty file."""
        note = self.path.with_name(f"{_INCOMPLETE}-{self._pid}-{error.errno}")
        try:
            os.close(os.open(note, os.O_WRONLY | os.O_CREAT, 0o644))
        except OSError:
            with contextlib.suppress(OSError):
                os.write(2, f"flatout: the record stops, the program goes on: {error}\n".encode())

    def close(self) -> None:
        """The last flush."""
        self.flush()


def _line(document: dict[str, Any]) -> str:
    return json.dumps(document, default=repr) + "\n"


@dataclass(frozen=True)
class Step:
    """A turn (see ``turns.Turn``) in seconds since the header and in milliseconds.

    Phases that the program never entered are ``None``, and so are losses that could not be read.
    """

    index: int
    at_s: float
    step_ms: float
    phases_ms: dict[str, float | None]
    losses: tuple[float | None, ...]
    forwards: int
    backwards: int
    updates: int
    minor_faults: float | None
    major_faults: float | None
    peak_rss_bytes: int | None
    peak_device_bytes: int | None
    arm: int | None
    mark: str | None
    grad: bool
    rows: int | None = None
    elements: int | None = None


@dataclass(frozen=True)
class Event:
    """An ``event`` line."""

    at_s: float
    what: str
    subject: str
    why: str
    traceback: str | None


@dataclass(frozen=True)
class Gradient:
    """What one update of a parameter was made from, before any clipping.

    Attributes:
        norm: Euclidean, over all elements.
        elements: how many they are.
        sample: values of some elements, the same ones in every run; ``None``: not taken.
        roundoff: unit roundoff of the arithmetic that it was computed in; ``None``: not seen.
        noise: norm up to which it may be nothing but rounding; ``None``: not known, as of a matrix
            (``agent/flows.py``).
    """

    norm: float
    elements: int
    sample: array[float] | None
    roundoff: float | None = None
    noise: float | None = None


@dataclass(frozen=True)
class OutputTensor:
    """A floating tensor that a pass forward returned.

    Attributes:
        shape: its sizes; a loss has one element.
        mean, rms: over all elements.
        sample: values of some elements, the same ones in every run; ``None``: not taken.
        top1: index of the largest element of some rows (along the last dimension).
        lead: by how much it is larger than the second largest.
    """

    shape: tuple[int, ...]
    mean: float
    rms: float
    sample: array[float] | None
    top1: array[int] | None
    lead: array[float] | None


@dataclass(frozen=True)
class Output:
    """A call of an outermost module that does not train.

    Attributes:
        root: the module, by its class.
        inputs: SHA-256 of all tensors that went in; ``None``: not taken.
        digest: SHA-256 of all tensors that came out; ``None``: not taken.
        tensors: the first floating ones that came out.
    """

    root: str
    inputs: str | None
    digest: str | None
    tensors: tuple[OutputTensor, ...]


@dataclass(frozen=True)
class BufferState:
    """A floating buffer of a module, such as the running mean of batch norm."""

    name: str
    mean: float
    rms: float


@dataclass(frozen=True)
class RootState:
    """An outermost module at the end.

    Attributes:
        root: the module, by its class.
        digest: SHA-256 of all its parameters and buffers.
        non_finite: how many of their elements are not finite.
        buffers: its floating buffers.
        probabilities: how many of its outputs in training were looked at, where all are between 0
            and 1; else 0.
        ones: how many of these were exactly 1.
    """

    root: str
    digest: str
    non_finite: int
    buffers: tuple[BufferState, ...]
    probabilities: int = 0
    ones: int = 0


@dataclass(frozen=True)
class Learned:
    """What a comparison in the real training has shown of a setting.

    Attributes:
        knob, setting: that was compared with the bare program.
        kept: whether it is on from then on.
        value, low, high, pairs: the ratio, see ``ratios.Ratio``.
    """

    knob: str
    setting: str
    kept: bool
    value: float
    low: float
    high: float
    pairs: int


S = TypeVar("S", bound=Sized)


class _Loops(Generic[S]):
    """What a process did again and again: steps of training, and passes forward alone."""

    steps: S
    evaluations: S

    @property
    def trains(self) -> bool:
        """Whether the process trained; if not, its steps are those of the inference loop."""
        return bool(len(self.steps))

    @property
    def turns(self) -> S:
        """The steps of the program: of its training loop or else of its inference loop."""
        return self.steps if self.trains else self.evaluations


@dataclass
class ProcessRecord(_Loops[list[Step]]):
    """Everything that one process recorded.

    ``gradients`` has those of the first updates of each parameter, ``outputs`` the passes forward
    that do not train; ``state`` is ``None`` where it was not asked for, or not reached.
    """

    path: Path
    header: dict[str, Any]
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Step] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    inputs: tuple[str, ...] | None = None
    modules: set[str] = field(default_factory=set)
    profile: dict[str, Any] | None = None
    gradients: dict[str, list[Gradient]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    state: tuple[RootState, ...] | None = None
    end: dict[str, Any] | None = None

    @property
    def rank(self) -> int:
        """Its rank in a distributed job, else 0."""
        return _rank(self.header)


@dataclass
class RunRecord:
    """All processes of one run, the main one first (that trained most, of equal ones rank 0)."""

    directory: Path
    processes: list[ProcessRecord]

    @property
    def main(self) -> ProcessRecord | None:
        """The process that the report is about, ``None`` when no agent recorded anything."""
        return self.processes[0] if self.processes else None

    @property
    def modules(self) -> set[str]:
        """The files that all its processes have imported, see the format above."""
        return set().union(*(process.modules for process in self.processes))


def record_path(run_directory: Path, pid: int) -> Path:
    """The record file of the process ``pid``."""
    return run_directory / f"record-{pid}.jsonl"


@dataclass
class StepTimes(_Loops["array[float]"]):
    """How long the turns of one process took, in milliseconds, no more of them; and its events.

    ``learned`` is ``None`` where no comparison came to its end; ``modules`` are those of all
    processes.
    """

    steps: array[float]
    evaluations: array[float]
    rank: int
    events: list[Event] = field(default_factory=list)
    learned: list[Learned] | None = None
    torch: str = ""
    threads: int = 0
    inputs: tuple[str, ...] | None = None
    modules: set[str] = field(default_factory=set)


def write_failure(run_directory: Path) -> str | None:
    """Why a process could not write its record to the end, ``None`` if all could."""
    for note in sorted(run_directory.glob(f"{_INCOMPLETE}-*-*")):
        number = note.name.rpartition("-")[2]
        if number.isdecimal() and len(number) < _LONGEST_NUMBER:
            return os.strerror(int(number))
    return None


def read_run(run_directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RecordError: the directory is missing, or a file in it is not a record of this version.
    """
    processes = [read_process(path) for path in _record_paths(run_directory)]
    return RunRecord(run_directory, sorted(processes, key=_importance, reverse=True))


def read_step_times(run_directory: Path) -> StepTimes | None:
    """The step times of the main process of a run, ``None`` when no agent recorded anything.

    A step read this way takes 8 bytes, in ``read_run`` 1.5 kB: for runs of any length.

    Raises:
        RecordError: the directory is missing, or a file in it is not a record of this version.
    """
    processes = [_process_step_times(path) for path in _record_paths(run_directory)]
    main = max(processes, key=_importance, default=None)
    if main is not None:
        main.modules = set().union(*(process.modules for process in processes))
    return main


class StepCounter:
    """Counts the steps of a run that goes on; it reads only what is new each time.

    Args:
        run_directory: of the run.
    """

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._files: dict[Path, _StepsOfFile] = {}

    def count(self) -> int:
        """The steps so far of the process that has made most of them.

        Raises:
            RecordError: the directory is missing, or a file in it holds no record.
        """
        for path in _record_paths(self._run_directory):
            self._files.setdefault(path, _StepsOfFile(path)).read()
        return max((file.count for file in self._files.values()), default=0)


class _StepsOfFile:
    """The steps of one record file that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = self._read_lines = 0
        self._kinds = {"step": 0, "evaluation": 0}
        self._begin()

    @property
    def count(self) -> int:
        """Of training if it trains, else of inference."""
        return self._kinds["step"] or self._kinds["evaluation"]

    def read(self) -> None:
        """Read the whole lines that are new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except OSError as error:
            raise RecordError(f"{self._path} cannot be read: {error.strerror}") from error
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            self._read_lines += 1
            with _unpacking(self._path, self._read_lines):
                document = json.loads(line)
                if document["kind"] == "header":
                    self._begin()
                elif document["kind"] == "events":
                    events = self._unpacker.events(_packed(document))
                    self._turns.tell(events, repeat(None))

    def _begin(self) -> None:
        self._turns, self._unpacker = Turns(self._add), _Unpacker()

    def _add(self, turn: Turn) -> None:
        self._kinds[turn.kind] += 1


def read_process(path: Path) -> ProcessRecord:
    """Read one record file; a torn last line is ignored.

    Raises:
        RecordError: the file cannot be read or is not a record of this version.
    """
    documents = _documents(path)
    _, header = next(documents)
    process = ProcessRecord(path, header)
    replay = _Replay(process, header)
    number = 1
    for number, document in documents:
        with _unpacking(path, number):
            replay = _read_line(document, process, replay)
    with _unpacking(path, number):
        replay.finish()
    return process


def _read_line(document: dict[str, Any], process: ProcessRecord, replay: _Replay) -> _Replay:
    """Add a line to a process; returns what replays the next ones."""
    kind = document.get("kind")
    if kind == "header":
        replay.finish()
        return _Replay(process, document)
    if kind == "events":
        replay.tell(_packed(document))
    elif kind == "losses":
        losses = [loss for (loss,) in struct.iter_unpack("<d", _packed(document))]
        replay.losses += losses
        replay.peak_device_bytes += [_optional_int(document, "peak_device_bytes")] * len(losses)
    elif kind == "event":
        process.events.append(_event(document))
    elif kind == "inputs":
        process.inputs = tuple(_words(document, "tensors"))
    elif kind == "modules":
        process.modules.update(_words(document, "files"))
    elif kind == "profile":
        process.profile = _profile(document)
    elif kind == "gradients":
        for name, gradient in _gradients(document):
            process.gradients.setdefault(name, []).append(gradient)
    elif kind == "outputs":
        process.outputs.append(_output(document))
    elif kind == "state":
        process.state = tuple(map(_root_state, _objects(document, "roots")))
    elif kind == "end":
        _value(document, "reason", str)
        process.end = document
        replay.last_peak_device_bytes = _optional_int(document, "peak_device_bytes")
    return replay


def _process_step_times(path: Path) -> StepTimes:
    documents = _documents(path)
    _, header = next(documents)
    times = StepTimes(array("d"), array("d"), _rank(header))
    times.torch, times.threads = str(header.get("torch")), header.get("threads") or 0

    def closed(turn: Turn) -> None:
        kept = times.steps if turn.kind == "step" else times.evaluations
        kept.append((turn.end_ns - turn.start_ns) / 1e6)

    turns, unpacker = Turns(closed), _Unpacker()
    number = 1
    for number, document in documents:
        kind = document.get("kind")
        with _unpacking(path, number):
            if kind == "header":
                turns.finish()
                turns, unpacker = Turns(closed), _Unpacker()
            elif kind == "events":
                turns.tell(unpacker.events(_packed(document)), repeat(None))
            elif kind == "event":
                times.events.append(_event(document))
            elif kind == "inputs":
                times.inputs = tuple(_words(document, "tensors"))
            elif kind == "modules":
                times.modules.update(_words(document, "files"))
            elif kind == "learned":
                times.learned = [_learned(entry) for entry in _objects(document, "settings")]
    with _unpacking(path, number):
        turns.finish()
    return times


# What a file says need not be what a writer wrote: a killed run may have left it, or a program.


def _value(document: dict[str, Any], name: str, *kinds: type) -> Any:
    """A value that is of one of these types.

    Raises:
        TypeError: it is of another, or missing where that is not allowed.
    """
    value = document.get(name)
    if type(value) not in kinds:
        raise TypeError(
            f"{name} is {_type_name(value)}, not {' or '.join(_NAMES[k] for k in kinds)}"
        )
    return value


_NAMES: dict[type, str] = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def _type_name(value: Any) -> str:
    return _NAMES.get(type(value), "unknown")


def _text(document: dict[str, Any], name: str) -> str:
    text: str = _value(document, name, str)
    return text


def _number(document: dict[str, Any], name: str) -> float:
    return float(_value(document, name, int, float))


def _optional_int(document: dict[str, Any], name: str) -> int | None:
    value: int | None = _value(document, name, int, type(None))
    return value


def _optional_number(document: dict[str, Any], name: str) -> float | None:
    value = _value(document, name, int, float, type(None))
    return None if value is None else float(value)


def _objects(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = _value(document, name, list)
    for item in items:
        if type(item) is not dict:
            raise TypeError(f"{name} holds {_type_name(item)}, not only objects")
    return items


def _words(document: dict[str, Any], name: str) -> list[str]:
    words: list[str] = _value(document, name, list)
    for word in words:
        if type(word) is not str:
            raise TypeError(f"{name} holds {_type_name(word)}, not only strings")
    return words


def _event(document: dict[str, Any]) -> Event:
    return Event(
        at_s=_number(document, "at_s"),
        what=_text(document, "what"),
        subject=_text(document, "subject"),
        why=_text(document, "why"),
        traceback=_value(document, "traceback", str, type(None)),
    )


def _learned(entry: dict[str, Any]) -> Learned:
    return Learned(
        knob=_text(entry, "knob"),
        setting=_text(entry, "setting"),
        kept=_value(entry, "kept", bool),
        **{name: _number(entry, name) for name in ("value", "low", "high")},
        pairs=_value(entry, "pairs", int),
    )


_HEADER: dict[str, tuple[type, ...]] = {
    "pid": (int,),
    "rank": (int, type(None)),
    "world_size": (int, type(None)),
    "started_ns": (int,),
    "program": (str,),
    "executable": (str,),
    "torch": (str,),
    "threads": (int,),
    "accelerator": (str, type(None)),
    "environment": (dict,),
}
"""Types of what is used of a header, as far as it is there."""

_PROFILE: dict[str, tuple[type, ...]] = {
    "steps": (int,),
    "step_ms": (int, float),
    "operators": (list,),
    "operators_total_ms": (int, float),
    "operators_total_calls": (int, float),
    "device_total_ms": (int, float, type(None)),
    "minor_faults": (int, float, type(None)),
    "minor_faults_of_thread": (int, float, type(None)),
    "page_fault_us": (int, float, type(None)),
    "page_fault_step_ms": (int, float, type(None)),
    "flops_by_dtype": (dict,),
    "counted": (dict,),
    "uncountable": (dict,),
    "facts": (dict,),
}


def _checked(document: dict[str, Any], kinds: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    for name in kinds.keys() & document.keys():
        _value(document, name, *kinds[name])
    return document


def _profile(document: dict[str, Any]) -> dict[str, Any]:
    _checked(document, _PROFILE)
    for operator in _objects(document, "operators") if "operators" in document else ():
        _text(operator, "name")
        _number(operator, "calls")
        _number(operator, "self_ms")
        for name in ("phase", "within"):
            _value(operator, name, str, type(None))
    return document


def _gradients(document: dict[str, Any]) -> Iterator[tuple[str, Gradient]]:
    for entry in _objects(document, "parameters"):
        sample = _array("f", entry["sample"])
        yield (
            _text(entry, "name"),
            Gradient(
                _number(entry, "norm"),
                _value(entry, "elements", int),
                sample,
                _optional_number(entry, "roundoff"),
                _optional_number(entry, "noise"),
            ),
        )


def _output(document: dict[str, Any]) -> Output:
    tensors = (
        OutputTensor(
            shape=tuple(_value({"shape": size}, "shape", int) for size in entry["shape"]),
            mean=_number(entry, "mean"),
            rms=_number(entry, "rms"),
            sample=_array("f", entry["sample"]),
            top1=_array("i", entry["top1"]),
            lead=_array("f", entry["lead"]),
        )
        for entry in _objects(document, "tensors")
    )
    inputs, digest = (_value(document, name, str, type(None)) for name in ("inputs", "digest"))
    return Output(_text(document, "root"), inputs, digest, tuple(tensors))


def _root_state(entry: dict[str, Any]) -> RootState:
    buffers = (
        BufferState(_text(b, "name"), _number(b, "mean"), _number(b, "rms"))
        for b in _objects(entry, "buffers")
    )
    return RootState(
        _text(entry, "root"),
        _text(entry, "digest"),
        _value(entry, "non_finite", int),
        tuple(buffers),
        _value(entry, "probabilities", int),
        _value(entry, "ones", int),
    )


def _array(code: str, packed: str | None) -> array[Any] | None:
    """Little-endian values of four bytes in base64."""
    if packed is None:
        return None
    data = base64.b64decode(packed, validate=True)
    return array(code, struct.unpack(f"<{len(data) // 4}{code}", data))


def _importance(process: ProcessRecord | StepTimes) -> tuple[int, int, int]:
    """Largest for the main process: the one that trained most, of equal ones rank 0."""
    return len(process.steps), len(process.evaluations), -process.rank


def _record_paths(run_directory: Path) -> list[Path]:
    if not run_directory.is_dir():
        raise RecordError(f"{run_directory} is not a run directory")
    return sorted(run_directory.glob("record-*.jsonl"))


def _rank(header: dict[str, Any]) -> int:
    rank = header.get("rank")
    return rank if isinstance(rank, int) else 0


_TIME_PLACE, _NOTE_PLACE, _USAGE_PLACE = 8, 9, 10
"""Where the last value of a kind is; that of a phase's modules or optimizers is at the phase."""


_LONGEST_SHIFT = 63
"""Of the last byte of a value of 64 bits in LEB128."""


class _Unpacker:
    """Unpacks the events of one process, from header to header."""

    def __init__(self) -> None:
        self._last = [0] * (_USAGE_PLACE + 3)

    def events(self, packed: bytes) -> Iterator[TorchEvent]:
        """The next packed events."""
        last, at, size = self._last, 0, len(packed)
        values = [0, 0, 0]
        while at < size:
            what = packed[at]
            at += 1
            kind, phase = what & 3, what >> 2 & 7
            for number in range(_value_count(kind, phase)):
                rest, shift = 0, 0
                while True:
                    if shift > _LONGEST_SHIFT:
                        raise ValueError("a value of more than 64 bits")
                    byte = packed[at]
                    at += 1
                    rest |= (byte & 127) << shift
                    if byte < 128:
                        break
                    shift += 7
                if kind == USAGE:
                    place = _USAGE_PLACE + number
                elif kind == NOTE:
                    place = _NOTE_PLACE
                else:
                    place = phase if number else _TIME_PLACE
                last[place] += rest >> 1 ^ -(rest & 1)
                values[number] = last[place]
            yield kind, phase, what >> 5, values[0], values[1], values[2]


class _Replay:
    """Makes steps of the events of one process, from header to header.

    Attributes:
        losses: the values read so far.
        peak_device_bytes: that much memory was allocated when each of them was read.
        last_peak_device_bytes: that much at the end, also where no losses were read.
    """

    def __init__(self, process: ProcessRecord, header: dict[str, Any]) -> None:
        self.losses: list[float] = []
        self.peak_device_bytes: list[int | None] = []
        self.last_peak_device_bytes: int | None = None
        self._process = process
        self._started_ns = int(header.get("started_ns", 0))
        self._unpacker = _Unpacker()
        self._losses_kept = 0
        self._turns = Turns(self._closed)
        self._closed_turns: list[tuple[Turn, dict[str, float | None]]] = []

    def tell(self, packed: bytes) -> None:
        """The next packed events."""
        self._turns.tell(self._unpacker.events(packed), iter(self._loss_number, None))

    def finish(self) -> None:
        """There are no more events."""
        self._turns.finish()
        peak_device_bytes: int | None = None
        last = {turn.kind: turn for turn, _ in self._closed_turns}
        for turn, phases_ms in self._closed_turns:
            losses: list[float | None] = []
            for number in turn.losses:
                assert isinstance(number, int)
                arrived = number < len(self.losses)
                losses.append(self.losses[number] if arrived else None)
                if arrived:
                    peak_device_bytes = self.peak_device_bytes[number]
            if turn is last[turn.kind]:
                peak_device_bytes = self.last_peak_device_bytes or peak_device_bytes
            step = Step(
                index=turn.index,
                at_s=(turn.start_ns - self._started_ns) / 1e9,
                step_ms=(turn.end_ns - turn.start_ns) / 1e6,
                phases_ms=phases_ms,
                losses=tuple(losses),
                forwards=turn.forwards,
                backwards=turn.backwards,
                updates=turn.updates,
                minor_faults=turn.minor_faults,
                major_faults=turn.major_faults,
                peak_rss_bytes=turn.peak_rss_bytes,
                peak_device_bytes=peak_device_bytes,
                arm=turn.arm,
                mark=turn.mark,
                grad=turn.grad,
                rows=turn.rows,
                elements=turn.elements,
            )
            process = self._process
            (process.steps if turn.kind == "step" else process.evaluations).append(step)

    def _loss_number(self) -> int:
        self._losses_kept += 1
        return self._losses_kept - 1

    def _closed(self, turn: Turn) -> None:
        unseen = {DATA, TRANSFER, OPTIMIZER} - self._turns.seen
        phases_ms = {
            name: None if phase in unseen else turn.phases_ns[phase] / 1e6
            for phase, name in enumerate(PHASES)
        }
        self._closed_turns.append((turn, phases_ms))


def _value_count(kind: int, phase: int) -> int:
    """How many values an event has; the same in ``intercept/_watch.c``."""
    if kind == USAGE:
        return 3
    return 2 if kind != NOTE and phase in (FORWARD, OPTIMIZER) else 1


def _documents(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a record file with their line numbers, a header first."""
    is_empty = True
    for number, document in _lines(path):
        if document.get("kind") == "header":
            with _unpacking(path, number):
                _checked(document, _HEADER)
            if document.get("version") != RECORD_VERSION:
                raise RecordError(
                    f"{path} has record version {one_line(document.get('version'))}, this flatout "
                    f"{RECORD_VERSION}"
                )
        elif is_empty:
            raise RecordError(f"{path} line {number}: no header comes before it")
        is_empty = False
        yield number, document
    if is_empty:
        raise RecordError(f"{path} is empty")


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _packed(document: dict[str, Any]) -> bytes:
    return base64.b64decode(document["packed"], validate=True)


@contextlib.contextmanager
def _unpacking(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,  # of the replay: these events do not follow from each other
        ArithmeticError,
        RecursionError,
        struct.error,
    ) as error:
        why = one_line(f"{type(error).__name__}: {error}")
        raise RecordError(f"{path} line {number} cannot be unpacked: {why}") from error


_UNPRINTABLE = re.compile(r"[^\x20-\x7e\n]|\\[ubfr]")
"""In a line: what may be a control character."""


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    return  # torn
                try:
                    document = json.loads(line)
                    if _UNPRINTABLE.search(line):
                        document = with_printable(document)
                except json.JSONDecodeError as error:
                    raise RecordError(f"{path} line {number} is not JSON: {error.msg}") from error
                except (ValueError, RecursionError) as error:  # huge numbers, deep nesting
                    why = one_line(error)
                    raise RecordError(f"{path} line {number} cannot be read: {why}") from error
                if not isinstance(document, dict):
                    raise RecordError(f"{path} line {number} is not a JSON object")
                yield number, document
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
