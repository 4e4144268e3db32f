"""The reader of the run record, in which the agent describes one run of a job.

A run has a directory, named by the environment variable ``FLATOUT_RUN``::

    request.json            the request to the agent (see ``wire/request.py``)
    record-PID.jsonl        the record of process PID, if its agent had something to record
    incomplete-PID-ERRNO    empty file; says that process PID failed to write its record, with the
                            error number

A record file is append-only JSON Lines. Each line is one object. Its ``kind`` names the dataclass
that has its other keys as fields (``wire/codec.py``): ``Header`` (``wire/header.py``) for the first
line, ``Profile`` (``wire/profile.py``), ``Replayed`` (``wire/replay.py``), or one of
``wire/lines.py``. ``wire/writer.py`` writes the file. The reader ignores a torn last line, unknown
kinds and unknown keys. The name of a time ends with its unit, and ``at_s`` is in seconds since the
header was written. A value that was not
measured is ``null`` or missing, never 0.

Steps and phases are not stored: ``wire/turns.py`` derives them from the events when the record is
read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import statistics
from array import array
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any, Generic, TypeVar

from flatout.text import one_line, with_printable
from flatout.wire.codec import MismatchError, decode
from flatout.wire.header import RECORD_VERSION, Header
from flatout.wire.lines import (
    AgentEvent,
    Captured,
    CpuUsage,
    End,
    FixedWork,
    Gradient,
    Gradients,
    ImportedFiles,
    Inputs,
    Learned,
    LearnedSettings,
    Losses,
    Output,
    PackedTrace,
    RootState,
    SharedWork,
    State,
)
from flatout.wire.packing import Unpacker
from flatout.wire.profile import Profile
from flatout.wire.replay import Replayed
from flatout.wire.request import RANK_VARIABLE
from flatout.wire.turns import DATA, OPTIMIZER, PHASES, TRANSFER, Turn, Turns

WARMUP_STEPS = 3
"""The number of steps at the beginning that do not count, because compilation, allocator, thread
pools and caches warm up."""


class RecordError(ValueError):
    """A record cannot be read: it is missing, has another version, or is no record at all."""


# The content of a record


@dataclass(frozen=True)
class Step:
    """A training step or an evaluation pass: a ``turns.Turn`` in seconds and milliseconds.

    Attributes:
        index: the number of turns of the same kind before this one.
        at_s: the beginning of the step, in seconds since the header.
        step_ms: the duration of the step.
        phases_ms: the exclusive time of each phase; ``None``: the program never entered that phase.
        losses: the losses from which the backward calls started; ``None``: not read.
        forwards, backwards, updates: the number of outermost module calls, of backward calls and of
            optimizer steps.
        minor_faults, major_faults: the page faults of the process during the step; ``None``: not
            measured.
        peak_rss_bytes: the peak resident set of the process so far, in a run with several ranks the
            sum over all of them; ``None``: not measured.
        peak_device_bytes: the largest amount of memory that torch has had allocated on the
            accelerator so far; ``None``: not known.
        arm: the number of the arm of a comparison, or of the run of a relay; ``None``: neither is
            running.
        block: the number of the block of the comparison, see ``turns.Turn.block``.
        mark: one of ``turns.MARKS``; ``None``: the step time is a usual one.
        grad: whether autograd recorded any of the forward calls.
        rows, elements: the number of rows and of elements of the inputs of the outermost module
            calls; ``None``: not recorded.
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
    block: int = 0

    @property
    def end_s(self) -> float:
        """The end of the step, in seconds since the header."""
        return self.at_s + self.step_ms / 1e3


S = TypeVar("S", bound=Sized)


class _Loops(Generic[S]):
    """The loops of a process: training steps, and evaluation passes.

    Attributes:
        steps: the training steps.
        evaluations: the forward passes that no backward call followed.
    """

    steps: S
    evaluations: S

    @property
    def trains(self) -> bool:
        """Whether the process trained. If not, its loop is an inference loop."""
        return bool(len(self.steps))

    @property
    def loop_steps(self) -> S:
        """The steps of the training loop, or of the inference loop if the process did not train."""
        return self.steps if self.trains else self.evaluations


@dataclass(frozen=True)
class UsageBeside:
    """The readings of another process.

    Attributes:
        shift_s: the seconds by which its header came after that of this process.
        usage: its readings.
    """

    shift_s: float
    usage: list[CpuUsage]


@dataclass
class ProcessRecord(_Loops[list[Step]]):
    """Everything that one process recorded.

    Attributes:
        path: the path of the record file.
        header: the first header of the file.
        steps, evaluations: the training steps, and the forward passes that no backward call
            followed.
        events: the events of the agent.
        inputs: the signature of the first outermost module call (``wire/signature.py``); ``None``:
            there was no such call.
        imported_files: the files that the program has imported, see ``lines.ImportedFiles``.
        profile: the profiled window; ``None``: no window was profiled.
        replayed: the replayed calls of a step; ``None``: none were replayed.
        gradients: a map from the name of a parameter to the gradients of its first optimizer steps.
        outputs: the outermost forward calls outside training.
        state: the state of the modules when the run ended; ``None``: not requested, or not reached.
        captures: the times that knobs took to capture parts of the program, which are part of no
            step, in seconds.
        fixed_work_us: the times of the fixed piece of work, see ``lines.FixedWork``.
        usage: the readings of CPU time, in order (``wire/disturbance.py``); an ``exec`` begins
            anew.
        usage_beside: the readings of the other processes of the job.
        shared_work: what this rank has shared out with others; ``None``: there were none, or it did
            not end in an orderly way.
        end: the last line; ``None``: the process did not end in an orderly way.
    """

    path: Path
    header: Header
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Step] = field(default_factory=list)
    events: list[AgentEvent] = field(default_factory=list)
    inputs: tuple[str, ...] | None = None
    imported_files: set[str] = field(default_factory=set)
    profile: Profile | None = None
    replayed: Replayed | None = None
    gradients: dict[str, list[Gradient]] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    state: tuple[RootState, ...] | None = None
    captures: list[Captured] = field(default_factory=list)
    fixed_work_us: list[float] = field(default_factory=list)
    usage: list[CpuUsage] = field(default_factory=list)
    usage_beside: list[UsageBeside] = field(default_factory=list)
    shared_work: SharedWork | None = None
    end: End | None = None

    @property
    def rank(self) -> int:
        """The rank of the process in a distributed job; 0 if the job is not distributed."""
        return self.header.rank or 0

    @property
    def threads(self) -> int | None:
        """The number of torch's intra-op threads during the profiled steps, because a program may
        set it after the import of torch; without a profile, the number at the import of torch.
        ``None``: not known."""
        facts = None if self.profile is None else self.profile.facts
        return (None if facts is None else facts.threads) or self.header.threads

    @property
    def timed_steps(self) -> list[Step]:
        """The steps of the loop that are neither profiled nor next to a switch of settings."""
        return [step for step in self.loop_steps if step.mark is None]

    @property
    def steady_steps(self) -> list[Step]:
        """The timed steps after the warm-up (``warmup_steps``). There may be none."""
        return [step for step in self.loop_steps[self.warmup_steps :] if step.mark is None]

    def beside(self, other: ProcessRecord) -> UsageBeside:
        """Return the readings of another process on the same host, as seen from this one."""
        return UsageBeside((other.header.started_ns - self.header.started_ns) / 1e9, other.usage)

    @property
    def warmup_steps(self) -> int:
        """The number of steps of the loop that do not count: ``WARMUP_STEPS``, but at most a
        quarter of all."""
        return min(WARMUP_STEPS, len(self.loop_steps) // 4)

    @property
    def whole_steps(self) -> list[Step]:
        """The steps of the loop, each lengthened by the evaluation passes of
        ``evaluations_before``."""
        groups = self._group_evaluations() if self.trains else {}
        return [
            dataclasses.replace(step, step_ms=step.step_ms + sum(p.step_ms for p in passes))
            if (passes := groups.get(id(step)))
            else step
            for step in self.loop_steps
        ]

    @property
    def micro_batches(self) -> int:
        """The usual number of steps from one optimizer step to the next; 1 if gradients do not
        accumulate over micro-batches."""
        ends = [number for number, step in enumerate(self.steps) if step.updates]
        return statistics.median_low(b - a for a, b in pairwise(ends)) if len(ends) > 1 else 1

    @property
    def in_steps_s(self) -> float:
        """The time of all steps and, if the program trains, of the evaluation passes after the
        first step, in seconds. There must be a step."""
        first_s = self.loop_steps[0].at_s
        passes = [one for one in self.evaluations if self.trains and one.at_s > first_s]
        return sum(step.step_ms for step in (*self.loop_steps, *passes)) / 1e3

    def evaluations_before(self, steps: Sequence[Step]) -> list[Step]:
        """Return the timed evaluation passes that come right before some training steps.

        Args:
            steps: some of the training steps.
        """
        groups = self._group_evaluations() if self.trains else {}
        return [one for step in steps for one in groups.get(id(step), ())]

    def _group_evaluations(self) -> dict[int, list[Step]]:
        """Group the timed evaluation passes by the id of the training step that follows."""
        groups: dict[int, list[Step]] = {}
        number = 0
        for one in self.evaluations:
            while number < len(self.steps) and self.steps[number].at_s <= one.at_s:
                number += 1
            if one.mark is None and number < len(self.steps):
                groups.setdefault(id(self.steps[number]), []).append(one)
        return groups


@dataclass
class RunRecord:
    """The records of all processes of one run.

    Attributes:
        directory: the directory of the run.
        processes: the records, main process first: the one with most training steps; ties go to the
            lowest rank.
    """

    directory: Path
    processes: list[ProcessRecord]

    @property
    def main(self) -> ProcessRecord | None:
        """The record of the main process; ``None``: no agent recorded anything."""
        return self.processes[0] if self.processes else None

    @property
    def imported_files(self) -> set[str]:
        """The files that any process of the run has imported, see ``lines.ImportedFiles``."""
        return set().union(*(process.imported_files for process in self.processes))


@dataclass
class StepTimes(_Loops["array[float]"]):
    """The step times of one process, in milliseconds, and its events.

    Attributes:
        header: the first header of the record file.
        steps, evaluations: the durations of the training steps and of the evaluation passes.
        events, inputs: the same as in ``ProcessRecord``.
        learned: the results of a comparison during training; ``None``: no comparison was completed.
        imported_files: the files that any process of the run has imported.
    """

    header: Header
    steps: array[float] = field(default_factory=lambda: array("d"))
    evaluations: array[float] = field(default_factory=lambda: array("d"))
    events: list[AgentEvent] = field(default_factory=list)
    learned: tuple[Learned, ...] | None = None
    inputs: tuple[str, ...] | None = None
    imported_files: set[str] = field(default_factory=set)


# Reading


def read_run(run_directory: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        RecordError: the directory is missing, or a file in it is not a record of this version.
    """
    found = [read_process(path) for path in record_paths(run_directory)]
    processes = sorted(found, key=_importance, reverse=True)
    companions: dict[str, ProcessRecord] = {}
    for process in processes:
        rank = process.header.environment.get(RANK_VARIABLE, "0")
        if rank != "0":
            companions.setdefault(rank, process)
    if companions and processes[0] not in companions.values():
        _add_memory(processes[0], companions.values())
    for main in processes[:1]:
        main.usage_beside = [
            main.beside(other) for other in processes[1:] if not _are_parent_and_child(main, other)
        ]
    return RunRecord(run_directory, processes)


def _are_parent_and_child(one: ProcessRecord, other: ProcessRecord) -> bool:
    """Return whether the readings of one of them include the other (``machine/usage.py``)."""
    one_pid, other_pid = one.header.pid, other.header.pid
    return one.header.parent_pid == other_pid or other.header.parent_pid == one_pid


def _add_memory(main: ProcessRecord, companions: Iterable[ProcessRecord]) -> None:
    """Add the memory of companions (``launch/companions.py``) to the steps of the main process."""
    for own, others in (
        (main.steps, [companion.steps for companion in companions]),
        (main.evaluations, [companion.evaluations for companion in companions]),
    ):
        for number, step in enumerate(own):
            peak = step.peak_rss_bytes
            if peak is not None:
                # A companion whose memory is not known repeats what the main process does.
                added = sum(_peak_at(steps, number) or peak for steps in others)
                own[number] = dataclasses.replace(step, peak_rss_bytes=peak + added)


def _peak_at(steps: Sequence[Step], number: int) -> int | None:
    """Return the peak memory up to a step, or up to the last one that was recorded."""
    return steps[min(number, len(steps) - 1)].peak_rss_bytes if steps else None


def read_step_times(run_directory: Path) -> StepTimes | None:
    """Read the step times of the main process of a run.

    This works for runs of any length: a step takes 8 bytes of memory here, and 1.5 kB in
    ``read_run``.

    Returns:
        The step times; ``None`` if no agent recorded anything.

    Raises:
        RecordError: the directory is missing, or a file in it is not a record of this version.
    """
    processes = [_process_step_times(path) for path in record_paths(run_directory)]
    main = max(processes, key=_importance, default=None)
    if main is not None:
        main.imported_files = set().union(*(process.imported_files for process in processes))
    return main


class StepCounter:
    """Counts the steps of a run that is going on. Each count reads only lines that are new.

    Args:
        run_directory: the directory of the run.
    """

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._files: dict[Path, _StepsOfFile] = {}

    def count(self) -> int:
        """Return the number of steps so far of the process with most steps.

        Raises:
            RecordError: the directory is missing, or a file in it is not a record of this version.
        """
        for path in record_paths(self._run_directory):
            self._files.setdefault(path, _StepsOfFile(path)).read()
        return max((file.count for file in self._files.values()), default=0)


class GrowingFile:
    """A record file that is being written.

    Args:
        path: the path of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read_bytes = self._read_lines = 0

    def read_new(self, kinds: Iterable[type]) -> Iterator[Any]:
        """Yield the complete lines of some kinds that were added since the last call.

        Raises:
            RecordError: the file is not a record of this version.
        """
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_bytes)
                new = file.read()
        except OSError as error:
            raise RecordError(f"{self._path} cannot be read: {error.strerror}") from error
        whole = new[: new.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        by_kind = {line.kind: line for line in kinds}  # type: ignore[attr-defined]
        for text in whole.decode("utf-8", "replace").split("\n")[:-1]:
            self._read_lines += 1
            number = self._read_lines
            document = _parse_object(self._path, number, text)
            _check_header(self._path, number, document, is_first=number == 1)
            if document.get("kind") in by_kind:
                with _name_line(self._path, number):
                    line: Any = decode(by_kind[document["kind"]], document)
                yield line

    @contextlib.contextmanager
    def name_line(self) -> Iterator[None]:
        """Return a context that converts an error about the last line to a ``RecordError``."""
        with _name_line(self._path, self._read_lines):
            yield


class _StepsOfFile:
    """Counts the steps of one record file that is being written.

    Args:
        path: the path of the record file.
    """

    def __init__(self, path: Path) -> None:
        self._file = GrowingFile(path)
        self._kinds = {"step": 0, "evaluation": 0}
        self._start_replay()

    @property
    def count(self) -> int:
        """Number of training steps, or of inference steps if there are none."""
        return self._kinds["step"] or self._kinds["evaluation"]

    def read(self) -> None:
        """Read the complete lines that are new."""
        for line in self._file.read_new((Header, PackedTrace)):
            if isinstance(line, Header):
                self._start_replay()
            else:
                with self._file.name_line():
                    self._turns.tell(self._unpacker.events(line.packed), repeat(None))

    def _start_replay(self) -> None:
        self._turns, self._unpacker = Turns(self._add), Unpacker()

    def _add(self, turn: Turn) -> None:
        self._kinds[turn.kind] += 1


def read_process(path: Path) -> ProcessRecord:
    """Read one record file; a torn last line is ignored.

    Raises:
        RecordError: the file cannot be read, or is not a record of this version.
    """
    lines = _decode_lines(path, _LINES_OF_PROCESS)
    number, header = next(lines)
    process = ProcessRecord(path, header)
    replay = _Replay(process, header.started_ns)
    for number, line in lines:
        with _name_line(path, number):
            if isinstance(line, Header):
                replay.finish()
                replay = _Replay(process, line.started_ns)
                process.usage.clear()
            else:
                _add(line, process, replay)
    with _name_line(path, number):
        replay.finish()
    return process


def _add(line: Any, process: ProcessRecord, replay: _Replay) -> None:
    """Add the content of a line to the record of a process."""
    match line:
        case PackedTrace():
            replay.tell(line.packed)
        case Losses():
            replay.losses += line.packed
            replay.peak_device_bytes += [line.peak_device_bytes] * len(line.packed)
        case AgentEvent():
            process.events.append(line)
        case CpuUsage():
            process.usage.append(line)
        case Inputs():
            process.inputs = line.tensors
        case ImportedFiles():
            process.imported_files.update(line.files)
        case Profile():
            process.profile = line
        case Replayed():
            process.replayed = line
        case Gradients():
            for gradient in line.parameters:
                process.gradients.setdefault(gradient.name, []).append(gradient)
        case Output():
            process.outputs.append(line)
        case State():
            process.state = line.roots
        case Captured():
            process.captures.append(line)
        case FixedWork():
            process.fixed_work_us.append(line.cpu_us)
        case SharedWork():
            process.shared_work = line
        case End():
            process.end = line
            replay.last_peak_device_bytes = line.peak_device_bytes


def _process_step_times(path: Path) -> StepTimes:
    lines = _decode_lines(path, _LINES_OF_STEP_TIMES)
    number, header = next(lines)
    times = StepTimes(header)

    def keep(turn: Turn) -> None:
        kept = times.steps if turn.kind == "step" else times.evaluations
        kept.append((turn.end_ns - turn.start_ns) / 1e6)

    turns, unpacker = Turns(keep), Unpacker()
    for number, line in lines:
        with _name_line(path, number):
            match line:
                case Header():
                    turns.finish()
                    turns, unpacker = Turns(keep), Unpacker()
                case PackedTrace():
                    turns.tell(unpacker.events(line.packed), repeat(None))
                case AgentEvent():
                    times.events.append(line)
                case Inputs():
                    times.inputs = line.tensors
                case ImportedFiles():
                    times.imported_files.update(line.files)
                case LearnedSettings():
                    times.learned = line.settings
    with _name_line(path, number):
        turns.finish()
    return times


_LINES_OF_STEP_TIMES: tuple[type, ...] = (
    Header,
    PackedTrace,
    AgentEvent,
    Inputs,
    ImportedFiles,
    LearnedSettings,
)
_LINES_OF_PROCESS: tuple[type, ...] = (
    Header,
    PackedTrace,
    Losses,
    AgentEvent,
    CpuUsage,
    Inputs,
    ImportedFiles,
    Profile,
    Replayed,
    Gradients,
    Output,
    State,
    Captured,
    FixedWork,
    SharedWork,
    End,
)


def _importance(process: ProcessRecord | StepTimes) -> tuple[bool, int, int, int]:
    """Return a sort key that is largest for the main process; see ``RunRecord``.

    A companion (``launch/companions.py``) only repeats what the program does.
    """
    header = process.header
    is_program = header.environment.get(RANK_VARIABLE, "0") == "0"
    return is_program, len(process.steps), len(process.evaluations), -(header.rank or 0)


def record_paths(run_directory: Path) -> list[Path]:
    """Return the paths of the record files of a run.

    Raises:
        RecordError: the directory is missing.
    """
    if not run_directory.is_dir():
        raise RecordError(f"{run_directory} is not a run directory")
    return sorted(run_directory.glob("record-*.jsonl"))


class _Replay:
    """Derives steps from the events of one process, from one header to the next.

    Args:
        process: the record to which the steps are added.
        started_ns: the field of the header.

    Attributes:
        losses: the losses read so far.
        peak_device_bytes: for each loss, the peak of the allocated memory when it was read.
        last_peak_device_bytes: the peak of the allocated memory at the end of the process.
    """

    def __init__(self, process: ProcessRecord, started_ns: int) -> None:
        self.losses: list[float] = []
        self.peak_device_bytes: list[int | None] = []
        self.last_peak_device_bytes: int | None = None
        self._process = process
        self._started_ns = started_ns
        self._unpacker = Unpacker()
        self._loss_count = 0
        self._turns = Turns(self._add_turn)
        self._closed_turns: list[tuple[Turn, dict[str, float | None]]] = []

    def tell(self, packed: bytes) -> None:
        """Process the next packed events."""
        self._turns.tell(self._unpacker.events(packed), iter(self._next_loss_index, None))

    def finish(self) -> None:
        """Close the last turn and add all steps to the record of the process, after the last
        event."""
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
            block=turn.block,
        )

    def _next_loss_index(self) -> int:
        self._loss_count += 1
        return self._loss_count - 1

    def _add_turn(self, turn: Turn) -> None:
        unseen = {DATA, TRANSFER, OPTIMIZER} - self._turns.seen
        phases_ms = {
            name: None if phase in unseen else turn.phases_ns[phase] / 1e6
            for phase, name in enumerate(PHASES)
        }
        self._closed_turns.append((turn, phases_ms))


# Do not trust the file: the run may have been killed while writing, or another program may have
# written it.


def _decode_lines(path: Path, kinds: Iterable[type]) -> Iterator[tuple[int, Any]]:
    """Yield the lines of some kinds with their numbers. The first line must be a header."""
    by_kind = {line.kind: line for line in kinds}  # type: ignore[attr-defined]
    is_empty = True
    for number, document in _read_objects(path):
        kind = document.get("kind")
        _check_header(path, number, document, is_first=is_empty)
        is_empty = False
        if isinstance(kind, str) and kind in by_kind:
            with _name_line(path, number):
                line: Any = decode(by_kind[kind], document)
            yield number, line
    if is_empty:
        raise RecordError(f"{path} is empty")


def _check_header(path: Path, number: int, document: dict[str, Any], is_first: bool) -> None:
    """Raise ``RecordError`` if a line is a header of another version, or the first but no
    header."""
    if document.get("kind") == Header.kind:
        if document.get("version") != RECORD_VERSION:
            raise RecordError(
                f"{path} has record version {one_line(document.get('version'))}, this flatout "
                f"{RECORD_VERSION}"
            )
    elif is_first:
        raise RecordError(f"{path} line {number}: no header comes before it")


@contextlib.contextmanager
def _name_line(path: Path, number: int) -> Iterator[None]:
    """Return a context that converts an error to a ``RecordError`` with the number of the line."""
    try:
        yield
    except MismatchError as mismatch:
        why = one_line(mismatch)
        raise RecordError(f"{path} line {number} cannot be unpacked: {why}") from mismatch
    except (
        LookupError,
        ValueError,
        AssertionError,  # raised by the replay for an impossible sequence of events
        ArithmeticError,
    ) as error:
        why = one_line(f"{type(error).__name__}: {error}")
        raise RecordError(f"{path} line {number} cannot be unpacked: {why}") from error


_UNPRINTABLE = re.compile(r"[^\x20-\x7e\n]|\\[ubfr]")
"""Matches any text in a line that may stand for a control character."""


def _read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the complete lines of a file with their numbers; every string in them is printable."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    return  # torn
                yield number, _parse_object(path, number, line)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error


def _parse_object(path: Path, number: int, line: str) -> dict[str, Any]:
    """Return the JSON object of one line, with every string in it printable.

    Raises:
        RecordError: the line is not a JSON object.
    """
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
    return document
