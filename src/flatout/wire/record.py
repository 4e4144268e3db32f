"""The run record: what one run of a job left behind, and its reader.

A run has a directory, named by the environment variable ``FLATOUT_RUN``::

    request.json            what the agent was asked to do (see ``wire/request.py``)
    record-PID.jsonl        one file for each process whose agent had something to record
    incomplete-PID-ERRNO    empty: that process could not write its record to the end, and why

A record file is append-only JSON Lines. Each line is one object; its ``kind`` says which dataclass
its other keys are the fields of (``wire/codec.py``): ``Header`` (``wire/header.py``) for the first
line, ``Profile`` (``wire/profile.py``), and those of ``wire/lines.py``. ``wire/writer.py`` writes
the file. The reader ignores a torn last line, and kinds and keys that it does not know. Times are
in the unit that their name ends with, and ``at_s`` is seconds since the header was written. What
was not measured is ``null`` or missing, never 0.

What a step is, and its phases, ``wire/turns.py`` makes of the recorded events when the record is
read.
"""

from __future__ import annotations

import contextlib
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Generic, TypeVar

from flatout.text import one_line, with_printable
from flatout.wire.codec import MismatchError, decode
from flatout.wire.header import RECORD_VERSION, Header
from flatout.wire.lines import (
    End,
    Event,
    Events,
    Gradient,
    Gradients,
    Inputs,
    Learned,
    LearnedSettings,
    Losses,
    Modules,
    Output,
    RootState,
    State,
)
from flatout.wire.packing import Unpacker
from flatout.wire.profile import Profile
from flatout.wire.request import RANK_VARIABLE
from flatout.wire.turns import DATA, OPTIMIZER, PHASES, TRANSFER, Turn, Turns

WARMUP_STEPS = 3
"""Steps at the beginning that do not count: compilation, allocator, thread pools and caches warm
up."""


class RecordError(ValueError):
    """A record cannot be read: it is missing, of another version, or no record at all."""


# What a record holds


@dataclass(frozen=True)
class Step:
    """A step of training, or a forward pass alone: a ``turns.Turn`` in seconds and milliseconds.

    Attributes:
        index: how many of the same kind came before.
        at_s: its begin, in seconds since the header.
        step_ms: its length.
        phases_ms: exclusive time of each phase; ``None``: the program never entered that phase.
        losses: the losses that its backward calls started from; ``None``: not read.
        forwards, backwards, updates: how many calls of outermost modules, backward calls and steps
            of optimizers it had.
        minor_faults, major_faults: page faults of the process in it; ``None``: not measured.
        peak_rss_bytes: most memory of the process so far; ``None``: not measured.
        peak_device_bytes: most memory that torch had allocated on the accelerator so far.
        arm: number of the arm of a comparison, or of the run of a relay, that it belongs to.
        mark: one of ``turns.MARKS``; ``None``: its time is a usual one.
        grad: whether autograd recorded any of its forward calls.
        rows, elements: of the inputs of its outermost module calls; ``None``: not noted.
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


S = TypeVar("S", bound=Sized)


class _Loops(Generic[S]):
    """What a process did again and again: steps of training, and forward passes alone."""

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

    Attributes:
        path: the record file.
        header: its first header.
        steps, evaluations: steps of training, and forward passes that no backward call followed.
        events: what the agent did, skipped or failed to do.
        inputs: of the first outermost module call; ``None``: there was none.
        modules: files that the program has imported, see ``lines.Modules``.
        profile: the profiled window; ``None``: there was none.
        gradients: name of a parameter -> the gradients of its first updates.
        outputs: the forward passes that do not train.
        state: the modules at the end; ``None``: not asked for, or not reached.
        end: the last line; ``None``: the process did not end in an orderly way.
    """

    path: Path
    header: Header
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Step] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    inputs: tuple[str, ...] | None = None
    modules: set[str] = field(default_factory=set)
    profile: Profile | None = None
    gradients: dict[str, list[Gradient]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    state: tuple[RootState, ...] | None = None
    end: End | None = None

    @property
    def rank(self) -> int:
        """Its rank in a distributed job; 0 outside of one."""
        return self.header.rank or 0

    @property
    def threads(self) -> int | None:
        """Torch's intra-op threads in the profiled steps, or else as torch was imported: a program
        may set another number after that. ``None``: not known."""
        facts = None if self.profile is None else self.profile.facts
        return (None if facts is None else facts.threads) or self.header.threads

    @property
    def timed_steps(self) -> list[Step]:
        """The steps of the program that are neither profiled nor next to a switch of settings."""
        return [step for step in self.turns if step.mark is None]

    @property
    def steady_steps(self) -> list[Step]:
        """The timed steps after the first ``WARMUP_STEPS`` steps of the program.

        These tell how long a step usually takes. There may be none.
        """
        return [step for step in self.turns[WARMUP_STEPS:] if step.mark is None]

    def evaluations_between(self, steps: Sequence[Step]) -> list[Step]:
        """The timed evaluation passes from the first to the last of some steps of training.

        Args:
            steps: in order, at least one.
        """
        if not self.trains:
            return []
        first_s, last_s = steps[0].at_s, steps[-1].at_s
        return [
            evaluation
            for evaluation in self.evaluations
            if evaluation.mark is None and first_s <= evaluation.at_s <= last_s
        ]


@dataclass
class RunRecord:
    """All processes of one run, the main one first (that trained most, of equal ones rank 0)."""

    directory: Path
    processes: list[ProcessRecord]

    @property
    def main(self) -> ProcessRecord | None:
        """The process that a report is about; ``None``: no agent recorded anything."""
        return self.processes[0] if self.processes else None

    @property
    def modules(self) -> set[str]:
        """Files that any of its processes has imported, see ``lines.Modules``."""
        return set().union(*(process.modules for process in self.processes))


@dataclass
class StepTimes(_Loops["array[float]"]):
    """How long the steps of one process took, in milliseconds, and its events.

    Attributes:
        header: its first header.
        steps, evaluations, events, inputs: as in ``ProcessRecord``, steps as their length alone.
        learned: what a comparison has shown; ``None``: no comparison came to its end.
        modules: files that any process of the run has imported.
    """

    header: Header
    steps: array[float] = field(default_factory=lambda: array("d"))
    evaluations: array[float] = field(default_factory=lambda: array("d"))
    events: list[Event] = field(default_factory=list)
    learned: tuple[Learned, ...] | None = None
    inputs: tuple[str, ...] | None = None
    modules: set[str] = field(default_factory=set)


# Reading


def read_run(run_directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RecordError: the directory is missing, or a file in it is not a record of this version.
    """
    processes = [read_process(path) for path in _record_paths(run_directory)]
    return RunRecord(run_directory, sorted(processes, key=_importance, reverse=True))


def read_step_times(run_directory: Path) -> StepTimes | None:
    """Read the step times of the main process of a run.

    A step that is read this way takes 8 bytes, in ``read_run`` 1.5 kB, so this is for runs of any
    length.

    Returns:
        ``None`` when no agent recorded anything.

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
            with _naming(self._path, self._read_lines):
                document = json.loads(line)
                if document["kind"] == Header.kind:
                    self._begin()
                elif document["kind"] == Events.kind:
                    events = self._unpacker.events(decode(Events, document).packed)
                    self._turns.tell(events, repeat(None))

    def _begin(self) -> None:
        self._turns, self._unpacker = Turns(self._add), Unpacker()

    def _add(self, turn: Turn) -> None:
        self._kinds[turn.kind] += 1


def read_process(path: Path) -> ProcessRecord:
    """Read one record file; a torn last line is ignored.

    Raises:
        RecordError: the file cannot be read, or is not a record of this version.
    """
    lines = _decoded(path, _LINES_OF_PROCESS)
    number, header = next(lines)
    process = ProcessRecord(path, header)
    replay = _Replay(process, header.started_ns)
    for number, line in lines:
        with _naming(path, number):
            if isinstance(line, Header):
                replay.finish()
                replay = _Replay(process, line.started_ns)
            else:
                _add(line, process, replay)
    with _naming(path, number):
        replay.finish()
    return process


def _add(line: Any, process: ProcessRecord, replay: _Replay) -> None:
    """Add a line to a process."""
    match line:
        case Events():
            replay.tell(line.packed)
        case Losses():
            replay.losses += line.packed
            replay.peak_device_bytes += [line.peak_device_bytes] * len(line.packed)
        case Event():
            process.events.append(line)
        case Inputs():
            process.inputs = line.tensors
        case Modules():
            process.modules.update(line.files)
        case Profile():
            process.profile = line
        case Gradients():
            for gradient in line.parameters:
                process.gradients.setdefault(gradient.name, []).append(gradient)
        case Output():
            process.outputs.append(line)
        case State():
            process.state = line.roots
        case End():
            process.end = line
            replay.last_peak_device_bytes = line.peak_device_bytes


def _process_step_times(path: Path) -> StepTimes:
    lines = _decoded(path, _LINES_OF_STEP_TIMES)
    number, header = next(lines)
    times = StepTimes(header)

    def keep(turn: Turn) -> None:
        kept = times.steps if turn.kind == "step" else times.evaluations
        kept.append((turn.end_ns - turn.start_ns) / 1e6)

    turns, unpacker = Turns(keep), Unpacker()
    for number, line in lines:
        with _naming(path, number):
            match line:
                case Header():
                    turns.finish()
                    turns, unpacker = Turns(keep), Unpacker()
                case Events():
                    turns.tell(unpacker.events(line.packed), repeat(None))
                case Event():
                    times.events.append(line)
                case Inputs():
                    times.inputs = line.tensors
                case Modules():
                    times.modules.update(line.files)
                case LearnedSettings():
                    times.learned = line.settings
    with _naming(path, number):
        turns.finish()
    return times


_LINES_OF_STEP_TIMES: tuple[type, ...] = (Header, Events, Event, Inputs, Modules, LearnedSettings)
_LINES_OF_PROCESS: tuple[type, ...] = (
    *(Header, Events, Losses, Event, Inputs, Modules, Profile, Gradients, Output, State, End),
)


def _importance(process: ProcessRecord | StepTimes) -> tuple[bool, int, int, int]:
    """Largest for the main process: the one that trained most, of equal ones rank 0. A companion
    (``launch/companions.py``) only repeats what the program does."""
    header = process.header
    is_program = header.environment.get(RANK_VARIABLE, "0") == "0"
    return is_program, len(process.steps), len(process.evaluations), -(header.rank or 0)


def _record_paths(run_directory: Path) -> list[Path]:
    if not run_directory.is_dir():
        raise RecordError(f"{run_directory} is not a run directory")
    return sorted(run_directory.glob("record-*.jsonl"))


class _Replay:
    """Makes steps of the events of one process, from one header to the next.

    Args:
        process: where the steps go.
        started_ns: of the header.

    Attributes:
        losses: the values read so far.
        peak_device_bytes: how much memory was allocated at most when each of them was read.
        last_peak_device_bytes: the same at the end, also where no losses were read.
    """

    def __init__(self, process: ProcessRecord, started_ns: int) -> None:
        self.losses: list[float] = []
        self.peak_device_bytes: list[int | None] = []
        self.last_peak_device_bytes: int | None = None
        self._process = process
        self._started_ns = started_ns
        self._unpacker = Unpacker()
        self._losses_kept = 0
        self._turns = Turns(self._closed)
        self._closed_turns: list[tuple[Turn, dict[str, float | None]]] = []

    def tell(self, packed: bytes) -> None:
        """Take the next packed events."""
        self._turns.tell(self._unpacker.events(packed), iter(self._loss_number, None))

    def finish(self) -> None:
        """Close the last turn and add all steps to the process: there are no more events."""
        self._turns.finish()
        process = self._process
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
            step = self._step(turn, phases_ms, losses, peak_device_bytes)
            (process.steps if turn.kind == "step" else process.evaluations).append(step)

    def _step(
        self,
        turn: Turn,
        phases_ms: dict[str, float | None],
        losses: Iterable[float | None],
        peak_device_bytes: int | None,
    ) -> Step:
        return Step(
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


# What a file says need not be what a writer wrote: a killed run may have left it, or a program.


def _decoded(path: Path, kinds: Iterable[type]) -> Iterator[tuple[int, Any]]:
    """The lines of some kinds with their numbers, a header first."""
    by_kind = {line.kind: line for line in kinds}  # type: ignore[attr-defined]
    is_empty = True
    for number, document in _objects(path):
        kind = document.get("kind")
        if kind == Header.kind:
            if document.get("version") != RECORD_VERSION:
                raise RecordError(
                    f"{path} has record version {one_line(document.get('version'))}, this flatout "
                    f"{RECORD_VERSION}"
                )
        elif is_empty:
            raise RecordError(f"{path} line {number}: no header comes before it")
        is_empty = False
        if isinstance(kind, str) and kind in by_kind:
            with _naming(path, number):
                line: Any = decode(by_kind[kind], document)
            yield number, line
    if is_empty:
        raise RecordError(f"{path} is empty")


@contextlib.contextmanager
def _naming(path: Path, number: int) -> Iterator[None]:
    """Name the line that something is wrong with."""
    try:
        yield
    except MismatchError as mismatch:
        why = one_line(mismatch)
        raise RecordError(f"{path} line {number} cannot be unpacked: {why}") from mismatch
    except (
        LookupError,
        ValueError,
        AssertionError,  # of the replay: these events do not follow from each other
        ArithmeticError,
    ) as error:
        why = one_line(f"{type(error).__name__}: {error}")
        raise RecordError(f"{path} line {number} cannot be unpacked: {why}") from error


_UNPRINTABLE = re.compile(r"[^\x20-\x7e\n]|\\[ubfr]")
"""What may be a control character in a line."""


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines of a file with their numbers, every string in them printable."""
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
