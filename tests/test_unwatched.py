"""The page faults of a program with and without the agent, on made-up counts and real ones."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_memory import STEP

from flatout.machine import Ceilings
from flatout.tune import bare, unwatched
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.trial import Trial
from flatout.tune.unwatched import Observer, Sample, Unwatched
from flatout.wire.header import Header
from flatout.wire.profile import Profile
from flatout.wire.record import ProcessRecord

FAULT_US = 0.5


def process(faults: float | None, step_ms: float = 10.0) -> ProcessRecord:
    """A run with so many page faults a step."""
    steps = [replace(STEP, step_ms=step_ms, minor_faults=faults)] * 20
    return ProcessRecord(Path(), Header(), steps=steps, profile=Profile(page_fault_us=FAULT_US))


def factor(watched: float | None, unwatched_per_step: float) -> float:
    return Unwatched(unwatched_per_step * 100, FAULT_US).factor(process(watched))


def test_page_faults_that_only_the_agent_causes_are_taken_from_the_step() -> None:
    assert factor(4000.0, 0.0) == pytest.approx(0.8)
    assert factor(4000.0, 1000.0) == pytest.approx(0.8 / 0.95)
    assert "about 20% shorter" in str(unwatched.describe(0.8))


def test_page_faults_that_only_the_program_alone_has_are_added() -> None:
    assert factor(0.0, 4000.0) == pytest.approx(1.25)
    assert "about 25% longer" in str(unwatched.describe(1.25))


@pytest.mark.parametrize(
    ("watched", "alone"),
    [
        (4000.0, 4000.0),
        (4000.0, 2000.0),  # the run without the agent may have been half as fast
        (500.0, 0.0),  # 2.5 %
        (0.0, 500.0),
        (None, 4000.0),
    ],
)
def test_page_faults_that_do_not_matter_change_nothing(watched: float | None, alone: float) -> None:
    assert factor(watched, alone) == 1.0
    assert unwatched.describe(1.0) is None


def test_a_claim_counts_the_step_without_the_agent() -> None:
    watched, plan = (Trial(process(n, ms), 1.0, ended=False) for n, ms in ((4000.0, 10), (0.0, 8)))
    found = Pairs({}, {"allocator": "keep"}, [watched] * 3, [plan] * 3)
    assert found.ratio.value == pytest.approx(1.25)
    found.unwatched = Unwatched(0.0, FAULT_US)
    assert found.ratio.value == found.whole_ratio == pytest.approx(1.0)
    assert found.costs[0].step_ms == pytest.approx(8.0)
    assert found.unwatched_factor == pytest.approx(0.8)


def test_page_faults_are_counted_after_the_start() -> None:
    samples = [Sample(0.5 * n, 90_000 if n < 8 else 90_000 + 50 * (n - 8)) for n in range(16)]
    assert unwatched.faults_per_s(samples, 4.0) == pytest.approx(100.0)
    assert unwatched.faults_per_s(samples, 7.0) is None
    assert unwatched.faults_per_s([], 0.0) is None
    assert unwatched.decode(unwatched.encode(samples)) == samples


@pytest.mark.skipif(sys.platform != "linux", reason="/proc counts the page faults of others")
def test_the_process_that_computes_is_observed() -> None:
    program = "\n".join(
        (
            "import mmap, resource, sys",
            "block = mmap.mmap(-1, 4096 * 3000)",
            "for page in range(3000): block[4096 * page] = 1",
            "for number in range(3_000_000): pass",
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt, flush=True)",
            "sys.stdin.read()",
        )
    )
    observer = Observer(until_s=1000.0)
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **options) as child:
        counted = int(child.stdout.readline())
        assert observer(Path()) is False
        child.stdin.close()
    assert [sample.minor_faults for sample in observer.samples] == [pytest.approx(counted, abs=50)]
    assert Observer(until_s=0.0)(Path()) is True


class Alone:
    """The runner of trials of a program that has so many page faults per second alone."""

    def __init__(self, per_s: float) -> None:
        self.per_s = per_s
        self.lasted_s: list[float] = []

    def sample_unwatched(self, lasts_s: float) -> list[Sample]:
        self.lasted_s.append(lasts_s)
        return [Sample(n / 2, int(self.per_s * n / 2)) for n in range(round(2 * lasts_s) + 2)]


def compare(
    per_s: float, budget_s: float = 120.0, job_steps: int | None = None, cost: float | None = 0.5
) -> tuple[Any, Alone, list[str]]:
    said: list[str] = []
    trials: Any = Alone(per_s)
    first: Any = bare.BareRun(
        process=replace(process(4000.0), profile=Profile(page_fault_us=cost)),
        modules=frozenset(),
        program=SimpleNamespace(),  # type: ignore[arg-type]
        pace=Pace(3.0, 0.01),
        phases_ms={},
        budget_s=budget_s,
        proof=SimpleNamespace(),  # type: ignore[arg-type]
        job_steps=job_steps,
        can_relay=False,
    )
    ceilings: Ceilings | None = None
    return bare.compare_unwatched(first, trials, ceilings, said.append).unwatched, trials, said


def test_the_program_runs_once_without_the_agent() -> None:
    found, trials, said = compare(per_s=0.0)
    assert found == Unwatched(0.0, pytest.approx(FAULT_US))
    assert trials.lasted_s == [pytest.approx(4.6)]
    assert len(said) == 1
    assert "20% shorter" in said[0]
    found, _, said = compare(per_s=400_000.0)
    assert found.factor(process(4000.0)) == 1.0
    assert said == []


@pytest.mark.parametrize("unknown", [{"budget_s": 30.0}, {"job_steps": 100}, {"cost": None}])
def test_there_is_no_such_run_where_it_tells_nothing_or_takes_too_long(
    unknown: dict[str, Any],
) -> None:
    found, trials, _ = compare(0.0, **unknown)
    assert (found, trials.lasted_s) == (None, [])
