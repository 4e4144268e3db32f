"""Readings of CPU time: what is this job's, what is idle, what nobody tells."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from flatout.agent.usage import UsageLog
from flatout.machine import system, usage
from flatout.wire.lines import CpuUsage
from flatout.wire.writer import RecordWriter

STAT = """cpu  900 10 300 5000 200 0 10 40 0 0
cpu0 400 5 100 3000 100 0 5 30 0 0
cpu1 500 5 200 2000 100 0 5 10 0 0
intr 123 0 0
"""

linux_only = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux tells it")


def test_only_the_cpus_that_the_job_may_use_count() -> None:
    """A program on CPU 1 is not disturbed by work on CPU 0."""
    assert usage.parse_processor_times(STAT, {1}) == (21.0, 0.1)
    assert usage.parse_processor_times(STAT, {0, 1}) == (52.0, 0.4)


@pytest.mark.parametrize(
    "stat",
    ["", "cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n", "cpu0 1 2 3 4\n", "nonsense"],
)
def test_what_a_sandbox_does_not_tell_is_not_zero(stat: str) -> None:
    assert usage.parse_processor_times(stat, {0}) == (None, None)
    assert usage.parse_pressure_s("") is None


def test_the_time_of_throttling_of_both_versions(tmp_path: Path) -> None:
    one = tmp_path / "cpu" / "job"
    one.mkdir(parents=True)
    (one / "cpu.stat").write_text("nr_periods 9\nnr_throttled 2\nthrottled_time 1500000000\n")
    assert system.cpu_throttled_s(tmp_path, "4:cpu,cpuacct:/job\n") == 1.5
    two = tmp_path / "unified" / "job"
    two.mkdir(parents=True)
    (two / "cpu.stat").write_text("usage_usec 9\nthrottled_usec 250000\n")
    assert system.cpu_throttled_s(tmp_path / "unified", "0::/job\n") == 0.25
    assert system.cpu_throttled_s(tmp_path, "") is None


@linux_only
def test_a_child_that_runs_belongs_to_the_job() -> None:
    code = "print(1, flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        before, alone = usage.read(), time.process_time()
        child_s = 0.0
        while child_s < 0.05:  # however little CPU there is
            now = usage.read()
            child_s = (now.own_s - before.own_s) - (time.process_time() - alone)
        child.kill()
    assert now.idle_s is not None
    taken = usage.taken_between(before, now)
    assert taken is not None
    assert 0 <= taken <= 1
    ended = usage.read()  # its time is now that of a child that has ended
    assert ended.own_s >= now.own_s


def test_what_others_took_is_what_is_neither_idle_nor_own() -> None:
    before = usage.Usage(0, 2, 10.0, 0.0, 0, 100.0, 0.0, 0.0, None)
    after = before._replace(at_ns=1_000_000_000, own_s=10.6, idle_s=100.4)
    assert usage.taken_between(before, after) == pytest.approx(0.5)
    assert usage.taken_between(before, after._replace(own_s=13.0)) == 0
    assert usage.taken_between(before._replace(idle_s=None), after) is None


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_text", lambda path: "")
    monkeypatch.setattr(usage, "_entries", lambda folder: [])
    monkeypatch.setattr(system, "cpu_throttled_s", lambda: None)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    found = usage.read()
    assert (found.waited_s, found.idle_s, found.stolen_s, found.pressure_s) == (None,) * 4
    assert found.own_s > 0
    assert found.cpus >= 1


# The lines of a record


def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[UsageLog, SimpleNamespace]:
    """A log whose readings are counted, and take as long as ``costs_s`` says."""
    state = SimpleNamespace(now_s=100.0, costs_s=1e-4, readings=0, failures=[])

    def read() -> usage.Usage:
        state.now_s += state.costs_s
        state.readings += 1
        return usage.Usage(round(state.now_s * 1e9), 2, 1.0, 0.5, 3, None, None, None, None)

    clock = SimpleNamespace(perf_counter_ns=lambda: round(state.now_s * 1e9))
    monkeypatch.setattr("flatout.agent.usage.time", clock)
    monkeypatch.setattr("flatout.agent.usage.usage.read", read)
    record = RecordWriter(tmp_path, 1)
    record.started_ns = 100 * 10**9
    return UsageLog(record, state.failures.append), state


def test_readings_of_a_long_run_grow_rare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, state = log(tmp_path, monkeypatch)
    for _ in range(4 * 3600):
        readings.note_if_due(is_measured=False)
        state.now_s += 0.25
    assert 400 < state.readings < 1000
    readings.restart()
    before = state.readings
    for _ in range(40):
        readings.note_if_due(is_measured=True)
        state.now_s += 0.25
    assert state.readings - before == 40


def test_readings_that_take_long_are_made_rarely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings, state = log(tmp_path, monkeypatch)
    state.costs_s = 0.01  # hundreds of threads
    for _ in range(400):
        readings.note_if_due(is_measured=True)
        state.now_s += 0.25
    assert state.readings * state.costs_s < 0.003 * 100


def test_after_a_failure_there_are_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, state = log(tmp_path, monkeypatch)
    fails = functools.partial(os.listdir, "/there/is/no/such/folder")
    monkeypatch.setattr("flatout.agent.usage.usage.read", fails)
    assert readings.note() is None
    readings.note_if_due(is_measured=True)
    assert len(state.failures) == 1


def test_a_reading_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readings, _ = log(tmp_path, monkeypatch)
    line = readings.note()
    assert line == CpuUsage(at_s=0.0001, cpus=2, own_s=1.0, waited_s=0.5, preemptions=3)
