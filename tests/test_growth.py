"""Whether the memory of a plan grows without end, on made-up runs: what raises a suspicion, what a
longer pair of runs decides, and what follows."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_memory import STEP

from flatout.tune import growth, journal, memory
from flatout.tune.budget import ProofSize
from flatout.tune.growth import GrowthCheck
from flatout.tune.ledger import Ledger, Options
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.proof import Verdict
from flatout.tune.prover import ProofAttempt, Prover
from flatout.tune.trial import Trial
from flatout.tune.tuner import Tuner
from flatout.wire.header import Header
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Request

KIB, MIB = 2**10, 2**20

Peak = Callable[[int], float]
"""The bytes that a program holds at a step, above what it begins with."""

PASSED = Verdict(True, "the losses are identical", "bitwise", 20, True, ())


def flat(step: int) -> float:
    return 0.0


def leak(bytes_per_step: float, piece: int = 132 * KIB) -> Peak:
    """Every step keeps something, and the allocator takes memory in pieces."""
    return lambda step: step * bytes_per_step // piece * piece


def cache(bytes_per_step: float, steps: int) -> Peak:
    """A cache that fills during some steps."""
    return lambda step: min(step, steps) * bytes_per_step


def arenas(piece: int, *steps: int) -> Peak:
    """An allocator takes a large piece at each of these steps."""
    return lambda step: piece * sum(step >= at for at in steps)


def trial(peak: Peak, steps: int, on_device: bool = False) -> Trial:
    name = "peak_device_bytes" if on_device else "peak_rss_bytes"
    held = itertools.accumulate((peak(number) for number in range(steps)), max)
    done = [replace(STEP, **{name: 400 * MIB + int(bytes_held)}) for bytes_held in held]
    return Trial(ProcessRecord(Path(), Header(), steps=done), 1.0, ended=False)


class Programs:
    """The runner of trials of a bare program and of a plan that hold these bytes."""

    def __init__(self, bare: Peak, plan: Peak) -> None:
        self.bare, self.plan = bare, plan
        self.requests: list[Request] = []

    def run(self, request: Request, limit_s: float) -> Trial:
        self.requests.append(request)
        assert request.stop_steps is not None
        return trial(self.plan if request.settings else self.bare, request.stop_steps)


def check(
    bare: Peak,
    plan: Peak,
    steps: int = 20,
    budget_s: float = 1000.0,
    job_steps: int | None = None,
    settings: dict[str, str] | None = None,
) -> tuple[ProofAttempt, Programs, list[str]]:
    """Check a proven plan; returns the attempt, the runs that were made, and what was said."""
    said: list[str] = []
    ledger = Ledger(budget_s, lambda: 0.0, said.append, lambda *_: None)
    trials: Any = Programs(bare, plan)
    first: Any = SimpleNamespace(
        process=trial(bare, steps).process,
        pace=Pace(0.0, 0.01),
        proof=ProofSize(steps, 3, 2),
        job_steps=job_steps,
    )
    finished = Pairs(
        {}, settings or {"gc": "seldom"}, [trial(bare, steps)] * 3, [trial(plan, steps)] * 3
    )
    verdict, refusal = GrowthCheck(trials, ledger, first, Options()).check(finished, PASSED)
    return (
        ProofAttempt(finished, refusal, verdict, lambda part: pytest.fail("a search")),
        trials,
        said,
    )


def result_of(attempt: ProofAttempt) -> str | None:
    """The result of the check of the memory; ``None``: there is none."""
    assert attempt.verdict is not None
    return next((one.result for one in attempt.verdict.checks if one.name == "memory"), None)


@pytest.mark.parametrize(
    ("plan", "steps"),
    [
        (leak(50 * KIB), 20),
        (leak(50 * KIB, MIB), 50),  # in 20 steps, it would not have taken a piece
        (leak(50 * KIB, MIB), 200),
        (leak(5 * MIB), 20),
        (leak(5 * MIB, 64 * MIB), 50),
        (leak(5 * MIB, 64 * MIB), 200),
    ],
)
def test_a_leak_is_found_by_a_longer_pair(
    plan: Peak, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plenty = SimpleNamespace(available=64 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: plenty)
    attempt, trials, said = check(flat, plan, steps)
    assert [request.settings for request in trials.requests] == [{}, {"gc": "seldom"}]
    assert {request.stop_steps for request in trials.requests} == {max(400, 2 * steps)}
    assert "show whether the growth stops" in said[0]
    assert "about" in said[0]
    assert attempt.refusal is not None
    assert attempt.refusal.endswith("and does not stop")
    assert result_of(attempt) == "failed"


@pytest.mark.parametrize("steps", [20, 40, 200])
@pytest.mark.parametrize(
    "plan",
    [
        flat,
        cache(223 * KIB, 100),
        cache(5 * MIB, 15),
        arenas(4 * MIB, 14, 140),
        arenas(1 * MIB, 11, 16, 30, 60, 120),
    ],
)
def test_what_stops_is_no_leak(plan: Peak, steps: int) -> None:
    attempt, _, _ = check(flat, plan, steps)
    assert attempt.refusal is None
    assert result_of(attempt) in (None, "passed")


@pytest.mark.parametrize("own", [leak(50 * KIB), leak(5 * MIB), cache(5 * MIB, 100)])
def test_a_program_that_grows_by_itself_is_its_own_yardstick(own: Peak) -> None:
    attempt, trials, _ = check(own, own)
    assert (attempt.refusal, result_of(attempt), trials.requests) == (None, None, [])


def test_arenas_that_go_on_growing_in_large_pieces_are_not_decided() -> None:
    attempt, _, _ = check(flat, arenas(16 * MIB, 12, 250, 350))
    assert attempt.refusal is None
    assert result_of(attempt) == "open"


def test_without_time_for_a_longer_pair_the_plan_is_kept_and_the_growth_told() -> None:
    attempt, trials, said = check(flat, leak(223 * KIB), budget_s=2.0)
    assert not trials.requests
    assert attempt.refusal is None
    assert result_of(attempt) == "open"
    assert said == [
        "its memory grows by 231 KiB a step more than bare's (206 to 256 KiB, over 20 steps in "
        "3 pairs); whether the growth stops is not decided"
    ]


def test_a_job_that_ends_before_it_grows_any_further_is_not_run_longer() -> None:
    attempt, trials, _ = check(flat, leak(223 * KIB), job_steps=20)
    assert (attempt.refusal, trials.requests) == (None, [])
    _, trials, _ = check(flat, leak(223 * KIB), job_steps=90)
    assert {request.stop_steps for request in trials.requests} == {90}


def test_longer_runs_do_not_take_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    little = SimpleNamespace(available=800 * MIB)
    monkeypatch.setattr("psutil.virtual_memory", lambda: little)
    attempt, trials, _ = check(flat, leak(5 * MIB, 4 * KIB))
    assert {request.stop_steps for request in trials.requests} == {100}
    assert attempt.refusal is not None  # it needs more than is allowed already


def test_the_memory_of_an_accelerator_counts_where_there_is_one() -> None:
    grows = trial(leak(MIB), 20, on_device=True).process.loop_steps
    stays = trial(flat, 20, on_device=True).process.loop_steps
    host_grows = [replace(step, peak_rss_bytes=2**20 * n) for n, step in enumerate(stays, 400)]
    assert memory.find_peaks([stays], [host_grows])[1:] == (400 * MIB, 400 * MIB)
    for plan, expected in ((host_grows, "stays"), (grows, "open")):
        found = growth.measure_growth([stays], [plan], 1.1)
        assert found is not None
        assert found.result == expected


def test_what_was_not_measured_refuses_nothing() -> None:
    assert growth.measure_growth([[STEP] * 40], [[STEP] * 40], 1.1) is None
    short = trial(leak(MIB), 10).process.loop_steps
    assert growth.measure_growth([short], [short], 1.1) is None


def test_growth_leaves_out_settings_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    plenty = SimpleNamespace(available=64 * 2**30)
    monkeypatch.setattr("psutil.virtual_memory", lambda: plenty)
    for settings, culprits in (
        ({"precision": "bf16", "gc": "seldom"}, {"gc": "seldom"}),
        ({"precision": "bf16", "threads": "one"}, {"precision": "bf16"}),
    ):
        attempt, trials, _ = check(flat, leak(MIB), settings=settings)
        ledger = Ledger(1000.0, lambda: 0.0, lambda line: None, lambda *_: None)
        first: Any = SimpleNamespace(
            process=trial(flat, 20).process, pace=Pace(0.0, 0.01), proof=ProofSize(20, 3, 2)
        )
        runner: Any = trials
        prover = Prover(runner, ledger, first, Options())
        assert prover.find_culprits(settings, attempt) == culprits


LEAKING = """
import gc, sys
import torch
net = torch.nn.Linear(1024, 1024)  # memory is read every 20 ms
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
kept = []
for step in range(100_000):
    loss = net(torch.randn(256, 1024)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    if gc.get_threshold()[0] == 50_000 and sys.argv[1] != "0":  # the knob gc is on
        kept.append(torch.ones(int(sys.argv[1]) // 4))
"""


@pytest.mark.measured
@pytest.mark.tunes
@pytest.mark.parametrize(("kept_bytes", "why"), [(5 * MIB, "its peak memory is"), (0, None)])
def test_a_setting_under_which_a_program_leaks_is_refused(
    kept_bytes: int, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    (tmp_path / "program.py").write_text(LEAKING)
    command = [sys.executable, str(tmp_path / "program.py"), str(kept_bytes)]
    options = Options(budget_seconds=3600, steps=60, isolate=False)
    opened = journal.begin("verify", command)
    try:
        outcome = Tuner(
            command, options, opened, lambda line: None, lambda *_: None, lambda _: None
        ).verify({"gc": "seldom"}, 2)
    finally:
        opened.close()
    if why is None:
        assert outcome.evidence is not None, outcome.why
    else:
        assert outcome.evidence is None
        assert why in outcome.why
