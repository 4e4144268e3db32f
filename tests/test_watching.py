"""Watching a run with a plan: what is read from the record and from the machine."""

from __future__ import annotations

from pathlib import Path

from flatout.agent.fixed_work import FixedWorkTimer
from flatout.cli.watching import Expected, WatchedProcess, Watcher
from flatout.machine import usage
from flatout.plan.today import Promise
from flatout.wire.header import Header
from flatout.wire.lines import AgentEvent, FixedWork, Inputs
from flatout.wire.writer import RecordWriter
from tests.test_record import Program

PROMISE = Promise({"precision": "safe"}, bare_ms=8.0, plan_ms=4.0, steps=100)


class Run:
    """A run whose record grows; a step of it takes 10 ms."""

    def __init__(self, folder: Path, pid: int = 1) -> None:
        self.program = Program()
        self.record = RecordWriter(folder, pid)
        self.record.begin(Header(pid=pid, threads=2, torch="2.13.0"))
        self.record.flush()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.program.step()
        self.record.write_events(self.program.log.take_packed())
        self.record.flush()

    def event(self, what: str, knob: str, why: str = "why") -> None:
        self.record.write(AgentEvent(at_s=1.0, what=what, subject=knob, why=why))


def watched(folder: Path, promise: Promise = PROMISE) -> tuple[Watcher, list[str]]:
    said: list[str] = []
    return Watcher(lambda: Expected(promise), folder, said.append), said


def look(watcher: Watcher) -> None:
    watcher._due_s = 0.0
    watcher.tick()


def test_what_is_slow_is_said_once_while_the_run_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path)
    watcher, said = watched(tmp_path)
    look(watcher)
    run.event("failed", "precision", "withdrawn: boom")
    run.steps(1000)
    look(watcher)
    assert said == []  # ten seconds
    run.steps(1000)
    look(watcher)
    assert len(said) == 1
    assert "10 ms a step, 4 ms when it was measured (8 ms bare)" in said[0]
    assert "precision=safe is not in effect (withdrawn: boom)" in said[0]
    run.steps(3000)
    look(watcher)
    watcher.finish()
    assert len(said) == 1


def test_the_end_of_a_run_is_judged_as_well(tmp_path: Path) -> None:
    run = Run(tmp_path)
    watcher, said = watched(tmp_path)
    look(watcher)
    run.steps(2000)
    run.event("unused", "precision", "the program made no call that it handles")
    run.record.flush()
    watcher.finish()
    assert len(said) == 1
    assert "the program made no call" in said[0]


def test_short_runs_and_runs_as_fast_as_promised_are_silent(tmp_path: Path) -> None:
    run = Run(tmp_path)
    watcher, said = watched(tmp_path)
    look(watcher)
    run.steps(5)
    watcher.finish()
    fast, said_of_fast = watched(tmp_path, Promise({}, bare_ms=20.0, plan_ms=9.5, steps=100))
    run.steps(3000)
    look(fast)
    fast.finish()
    assert said == said_of_fast == []


def test_a_run_that_was_never_due_costs_nothing(tmp_path: Path) -> None:
    asked: list[bool] = []
    Run(tmp_path).steps(2000)
    watcher = Watcher(lambda: asked.append(True), tmp_path, print)
    watcher.tick()
    watcher.finish()
    assert not asked


def test_a_record_that_is_gone_ends_the_watching(tmp_path: Path) -> None:
    watcher, said = watched(tmp_path / "gone")
    look(watcher)
    watcher.finish()
    assert said == []


def test_the_process_with_the_longest_loop_is_judged(tmp_path: Path) -> None:
    evaluating, training = Run(tmp_path, 1), Run(tmp_path, 2)
    watcher, said = watched(tmp_path)
    look(watcher)
    evaluating.steps(200)
    training.event("failed", "precision")
    training.steps(2000)
    look(watcher)
    assert len(said) == 1


def test_another_rank_is_not_judged(tmp_path: Path) -> None:
    Run(tmp_path, 1).steps(5)
    other = RecordWriter(tmp_path, 2)
    other.begin(Header(pid=2, environment={"FLATOUT_RANK": "1"}))
    program = Program()
    for _ in range(3000):
        program.step()
    other.write_events(program.log.take_packed())
    other.write(AgentEvent(1.0, "failed", "precision", "why"))
    other.flush()
    watcher, said = watched(tmp_path)
    look(watcher)
    assert said == []


def test_what_is_read_of_a_process(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.record.write(Inputs(("float32[64,784]",)))
    for us in (40.0, 41.0):
        run.record.write(FixedWork(us))
    run.event("applied", "precision")
    run.event("skipped", "precision", "one layer is left alone: it is too small")
    run.event("skipped", "gc", "the program configures garbage collection itself")
    run.event("applied", "threads")
    run.event("undone", "threads", "proven with inputs a, these are b")
    run.event("skipped", "threads", "proven with inputs a, these are b")
    run.record.flush()
    process = WatchedProcess(run.record.path, 100)
    process.read()
    assert process.inputs == ("float32[64,784]",)
    assert list(process.fixed_work_us) == [40.0, 41.0]
    assert process.left_out == {
        "gc": "the program configures garbage collection itself",
        "threads": "proven with inputs a, these are b",
    }


def test_the_fixed_work_is_done_once_a_second() -> None:
    timer = FixedWorkTimer()
    done = timer.measure_if_due()
    assert done is not None
    assert done.cpu_us > 0
    assert timer.measure_if_due() is None
    timer._due_ns = 0
    assert timer.measure_if_due() is not None


def test_a_program_that_replaces_itself_begins_anew(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.steps(2000)
    process = WatchedProcess(run.record.path, 100)
    process.read()
    assert process.stretches.done
    run.record.begin(Header(pid=1))
    run.record.flush()
    process.read()
    assert not process.stretches.done


def test_a_quota_is_told_as_a_share_of_the_time() -> None:
    first = usage.read()._replace(at_ns=0, throttled_s=0.0)
    last = first._replace(at_ns=2_000_000_000, throttled_s=0.5)
    assert usage.throttled_between(first, last) == 0.25
    assert usage.throttled_between(first._replace(throttled_s=None), last) is None
