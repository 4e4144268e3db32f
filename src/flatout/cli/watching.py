"""Watches a run with a plan, and says once if the plan does not bring what it promised.

While the job runs, flatout's own process only waits for its end. Every other second it reads what
the agent has added to the record, and how much of the CPUs other programs use. ``plan/today.py``
decides.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path

from flatout import machine, plan
from flatout.machine import usage
from flatout.machine.usage import Usage
from flatout.plan import today
from flatout.plan.today import Promise, Stretch, Stretches, Today
from flatout.wire.header import Header
from flatout.wire.lines import AgentEvent, FixedWork, Inputs, PackedTrace
from flatout.wire.packing import Unpacker
from flatout.wire.record import GrowingFile, RecordError, record_paths
from flatout.wire.request import RANK_VARIABLE
from flatout.wire.turns import Turns

PERIOD_S = 2.0
"""The time between two looks at the record."""

LONGEST_S = 600.0
"""A run is watched for this long from its start."""

READING_S = 4.0
"""The CPU time that watching may take in all. Reading the steps of a second takes about 1 ms at
steps of 100 ms, and 60 ms at steps of 1 ms."""

_LEFT_OUT = "flatout has said above why"

_KINDS = (Header, PackedTrace, AgentEvent, Inputs, FixedWork)


class WatchedProcess:
    """What the record of one process says so far.

    Args:
        path: the path of its record file.
        proven_steps: see ``Stretches``.

    Attributes:
        header: its header; ``None``: it is not written yet.
        stretches: its steps.
        inputs: see ``Today``.
        fixed_work_us: the times of the fixed piece of work that were read in the last looks.
    """

    def __init__(self, path: Path, proven_steps: int) -> None:
        self._file = GrowingFile(path)
        self._proven_steps = proven_steps
        self._reasons: dict[str, str] = {}
        self._in_effect: dict[str, bool] = {}
        self.header: Header | None = None
        self.inputs: tuple[str, ...] | None = None
        self.fixed_work_us: deque[float] = deque(maxlen=today.JUDGED_STRETCHES)
        self._start_replay()

    def _start_replay(self) -> None:
        self.stretches = Stretches(self._proven_steps)
        self._turns, self._unpacker = Turns(self.stretches.add), Unpacker()

    def read(self) -> None:
        """Read the complete lines that are new.

        Raises:
            RecordError: the file is not a record of this version.
        """
        for line in self._file.read_new(_KINDS):
            match line:
                case Header():
                    self.header = line
                    self._start_replay()
                case PackedTrace():
                    with self._file.name_line():
                        self._turns.tell(self._unpacker.events(line.packed), repeat(None))
                case Inputs():
                    self.inputs = line.tensors
                case FixedWork():
                    self.fixed_work_us.append(line.cpu_us)
                case AgentEvent():
                    self._note(line)

    def _note(self, event: AgentEvent) -> None:
        if event.what == "applied":
            self._in_effect[event.subject] = True
        elif event.what in ("undone", "failed", "unused"):
            self._in_effect[event.subject] = False
            self._reasons.setdefault(event.subject, event.why)
        elif event.what == "skipped":
            self._in_effect.setdefault(event.subject, False)
            self._reasons.setdefault(event.subject, event.why)

    @property
    def left_out(self) -> dict[str, str]:
        """knob -> why its setting is not in effect, of those of which the record says something."""
        return {name: self._reasons[name] for name, is_on in self._in_effect.items() if not is_on}

    @property
    def importance(self) -> tuple[bool, int]:
        """A key that is largest for the process that is judged: the one with the longest loop that
        is not another rank's."""
        header = self.header
        is_program = header is not None and header.environment.get(RANK_VARIABLE, "0") == "0"
        return is_program, sum(one.steps for one in self.stretches.done)


@dataclass(frozen=True)
class Expected:
    """What a run with a plan is compared with.

    Attributes:
        promise: what the plan promises.
        left_out: knob -> why its setting was not asked for.
        machine_causes: see ``Today``.
    """

    promise: Promise
    left_out: Mapping[str, str] = field(default_factory=dict)
    machine_causes: tuple[str, ...] = ()


class Watcher:
    """Watches one run with a plan.

    Args:
        expect: returns what the run is compared with; ``None``: with nothing. It is called some
            seconds after the start, so that no run starts later for it.
        run_directory: the directory of the run.
        say: prints a line.
    """

    def __init__(
        self, expect: Callable[[], Expected | None], run_directory: Path, say: Callable[[str], None]
    ) -> None:
        self._expect = expect
        self._expected: Expected | None = None
        self._run_directory = run_directory
        self._say = say
        self._processes: dict[Path, WatchedProcess] = {}
        self._readings: deque[Usage] = deque(maxlen=int(LONGEST_S / PERIOD_S))
        self._started_s = time.monotonic()
        self._due_s = self._started_s + PERIOD_S
        self._spent_s = 0.0
        self._is_over = False

    def tick(self) -> None:
        """Look at the record, if that is due."""
        now_s = time.monotonic()
        if now_s >= self._due_s and not self._is_over:
            self._due_s = now_s + PERIOD_S
            is_last = now_s > self._started_s + LONGEST_S or self._spent_s > READING_S
            before_s = time.process_time()
            self._look()
            self._spent_s += time.process_time() - before_s
            self._is_over |= is_last

    def finish(self) -> None:
        """Look for the last time, after the end of the job."""
        if self._expected is not None and not self._is_over:
            self._look()
            self._is_over = True

    def _look(self) -> None:
        if self._expected is None:
            self._expected = self._expect()
        expected = self._expected
        if expected is None:
            self._is_over = True
            return
        try:
            for path in record_paths(self._run_directory):
                if path not in self._processes:
                    self._processes[path] = WatchedProcess(path, expected.promise.steps)
                self._processes[path].read()
        except RecordError:
            self._is_over = True  # the summary at the end of the run says why
            return
        self._readings.append(usage.read())
        process = max(self._processes.values(), key=lambda one: one.importance, default=None)
        if process is None or process.header is None:
            return
        shortfall = today.find_shortfall(expected.promise, self._describe(process, expected))
        if shortfall is not None:
            self._say(str(shortfall))
            self._is_over = True

    def _describe(self, process: WatchedProcess, expected: Expected) -> Today:
        header, stretches = process.header, process.stretches.done
        assert header is not None
        readings = self._find_readings(today.judged(stretches) or stretches)
        taken = throttled = None
        if readings is not None:
            taken = usage.taken_between(*readings)
            throttled = usage.throttled_between(*readings)
        cpus = self._readings[-1].cpus
        work_us = process.fixed_work_us
        return Today(
            stretches=stretches,
            inputs=process.inputs,
            threads=header.threads,
            torch=header.torch,
            machine_causes=expected.machine_causes,
            left_out={**expected.left_out, **process.left_out},
            cpus=cpus,
            others_cpus=None if taken is None else taken * cpus,
            throttled_share=throttled,
            fixed_work_us=today.low_quantile(work_us) if work_us else None,
        )

    def _find_readings(self, stretches: Sequence[Stretch]) -> tuple[Usage, Usage] | None:
        """Return the first and the last reading of CPU times during some stretches, if there are
        two."""
        if not stretches:
            return None
        inside = [
            one
            for one in self._readings
            if stretches[0].start_ns <= one.at_ns <= stretches[-1].end_ns + PERIOD_S * 1e9
        ]
        return (inside[0], inside[-1]) if len(inside) > 1 else None


def watch(
    path: Path,
    command: Sequence[str],
    asked: Collection[str],
    run_directory: Path,
    say: Callable[[str], None],
) -> Watcher:
    """Return what watches a run with a plan.

    Args:
        path: the file of the plan.
        command: the command of the run.
        asked: the knobs whose settings the run was asked to apply.
        run_directory: the directory of the run.
        say: prints a line.
    """

    def expect() -> Expected | None:
        try:
            applied = plan.read(path)
        except plan.PlanError:  # it was removed or changed meanwhile
            return None
        promise = today.promise_of(applied, command)
        if promise is None:
            return None
        left_out = {name: _LEFT_OUT for name in applied.settings if name not in asked}
        return Expected(
            promise, left_out, today.find_machine_causes(applied, machine.fingerprint())
        )

    return Watcher(expect, run_directory, say)
