"""How long a tune takes, and what its proof gets of that time: pure arithmetic on known paces."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flatout.tune import budget, statistics
from flatout.tune.bare import find_outside_steps_s
from flatout.tune.budget import (
    GRADIENT_STEPS,
    ProofSize,
    choose_budget_s,
    count_gradient_steps,
    extend_budget_s,
    size_proof,
)
from flatout.tune.cold import ColdTrials
from flatout.tune.pairs import Pace
from flatout.wire.record import WARMUP_STEPS

PACES = [
    Pace(start_s, step_s)
    for start_s in (1.0, 5.0)
    for step_s in (0.0003, 0.003, 0.03, 0.1, 0.5, 2.0, 5.0, 10.0)
]


@pytest.mark.parametrize(
    ("step_s", "budget_s"),
    [(0.0003, 150), (0.1, 150), (1.05, 315), (2.0, 480), (6.0, 690), (10.0, 900), (20.0, 1800)],
)
def test_the_budget_follows_the_step(step_s: float, budget_s: float) -> None:
    assert choose_budget_s(Pace(3.0, step_s)) == pytest.approx(budget_s)


@pytest.mark.parametrize(
    ("wanted_s", "is_named", "budget_s"),
    [(140, False, 150), (170, False, 170), (190, False, 150), (170, True, 150)],
)
def test_only_a_budget_that_the_user_has_not_named_is_extended_for_a_proof(
    wanted_s: float, is_named: bool, budget_s: float
) -> None:
    assert extend_budget_s(150, wanted_s, is_named=is_named) == budget_s


def test_a_long_start_or_cycle_gets_a_longer_budget() -> None:
    assert choose_budget_s(Pace(60.0, 0.01)) > 10 * 60
    assert choose_budget_s(Pace(3.0, 0.01, cycle_steps=2000)) > 10 * 20
    assert choose_budget_s(Pace(10.0, 0.01)) == 150


@pytest.mark.parametrize("pace", PACES, ids=str)
def test_the_smallest_proof_fits_into_the_usual_budget(pace: Pace) -> None:
    budget_s = choose_budget_s(pace)
    size = size_proof(pace, budget_s, seen_steps=max(5, min(2000, int(5 / pace.step_s))))
    pairs_s = 2 * size.pairs * pace.seconds(size.steps)
    gradients_s = 2 * size.gradient_seeds * pace.seconds(GRADIENT_STEPS + 1)
    assert pairs_s + gradients_s <= 0.75 * budget_s
    assert size.steps >= budget.FEW_STEPS
    assert size.pairs >= 3
    if pace.step_s <= 0.1 and pace.outside_steps_s < 5:
        assert size.pairs == 5
        assert size.steps >= 20


def test_the_proof_of_a_program_with_cycles_covers_whole_ones() -> None:
    for cycle_steps in (10, 147, 320):
        for start_s in (1.0, 5.0):
            pace = Pace(start_s, 0.004, cycle_steps)
            size = size_proof(pace, choose_budget_s(pace), seen_steps=1000)
            assert size.steps > WARMUP_STEPS
            assert (size.steps - WARMUP_STEPS) % cycle_steps == 0


def test_a_cycle_that_takes_most_of_the_budget_is_not_covered() -> None:
    size = size_proof(Pace(3.0, 0.1, 3000), 150.0, seen_steps=40)
    assert 20 <= size.steps <= 40


@pytest.mark.parametrize("job_steps", [1, 2, 7, 47, 93])
def test_the_proof_of_a_short_job_takes_its_whole_run(job_steps: int) -> None:
    size = size_proof(Pace(3.0, 0.05), 150.0, seen_steps=job_steps, job_steps=job_steps)
    assert size.steps == job_steps


def test_what_the_user_asks_for_is_what_is_proven() -> None:
    assert size_proof(Pace(3.0, 1.0), 60.0, seen_steps=5, wanted_steps=500).steps == 500


@pytest.mark.parametrize("budget_s", [20.0, 40.0, 60.0, 90.0, 150.0])
def test_short_steps_are_measured_beside_a_long_start_up(budget_s: float) -> None:
    """8 steps of 2 ms after 5 s of start-up once refused a plan of 1.7x as 0.68x."""
    pace = Pace(5.5, 0.002)
    steps = size_proof(pace, budget_s, seen_steps=800).steps
    assert steps * pace.step_s >= pace.outside_steps_s / 12 - pace.step_s


def test_whole_cycles_are_covered_even_if_they_are_short_and_steps_slow() -> None:
    size = size_proof(Pace(5.0, 1.2, 10), 240.0, seen_steps=11)
    assert size.steps == 13
    assert size_proof(Pace(6.0, 1.5), 300.0, seen_steps=11, job_steps=18).steps == 18


@pytest.mark.parametrize(("micro_batches", "steps"), [(1, 5), (2, 5), (3, 7), (8, 9)])
def test_gradients_are_compared_over_whole_cycles_of_micro_batches(
    micro_batches: int, steps: int
) -> None:
    assert count_gradient_steps(Pace(1.0, 0.1, micro_batches=micro_batches)) == steps


def test_a_small_proof_is_reserved_as_long_as_there_is_nothing_to_prove() -> None:
    bare: Any = SimpleNamespace(
        pace=Pace(1.0, 0.01), proof=ProofSize(100, 5, 1), process=SimpleNamespace(trains=False)
    )
    stage: Any = SimpleNamespace(_ledger=SimpleNamespace(left_s=30.0), _bare=bare)
    assert ColdTrials._spare_s(stage, {"gc": "seldom"}) == pytest.approx(30 - 5 * 2 * 2)
    assert ColdTrials._spare_s(stage, {}) == pytest.approx(30 - 3 * 2 * 2)


def test_a_run_of_a_proof_does_not_mostly_start_up() -> None:
    """As TabNet's: 13 s of start-up and saving, and a validation after each 12 steps."""
    pace = Pace(13.0, 0.094, 12)
    size = size_proof(pace, choose_budget_s(pace), seen_steps=46, job_steps=300)
    assert size.steps == WARMUP_STEPS + 3 * 12
    assert size.pairs == statistics.FEWEST_PAIRS
    fewest_s = 2 * size.pairs * pace.seconds(size.steps)
    assert fewest_s < 0.7 * choose_budget_s(pace)


def run_of(seconds: float, step_ms: float, at_s: float, end_s: float, reason: str) -> Any:
    """A run of ten steps, the first of which begins at a time of its record."""
    steps = [SimpleNamespace(at_s=at_s + n * step_ms / 1e3, step_ms=step_ms) for n in range(10)]
    process = SimpleNamespace(
        loop_steps=steps,
        evaluations=[],
        trains=True,
        end=SimpleNamespace(at_s=end_s, reason=reason),
        replayed=SimpleNamespace(seconds=4.0),
        in_steps_s=10 * step_ms / 1e3,
    )
    return SimpleNamespace(process=process, seconds=seconds)


def test_the_time_of_profile_and_replay_is_not_expected_of_later_runs() -> None:
    """Two seconds before the record, three to the first step, a second of steps, nine of ours."""
    assert find_outside_steps_s(run_of(15.0, 100.0, 3.0, 13.0, "stopped")) == pytest.approx(5.0)
    assert find_outside_steps_s(run_of(15.0, 100.0, 3.0, 13.0, "exit")) == pytest.approx(10.0)


def test_runs_that_alternate_start_up_together() -> None:
    pace = Pace(5.0, 0.1, overlap_s=2.0)
    assert pace.pair_s(10) == pytest.approx(2 * (5 + 1) - 2)
    pace.learn(4.0)
    assert pace.seconds(0) == 4.0
    pace.learn(6.0)
    assert pace.seconds(0) == 4.0
    pace.learn_pair(10, 12.0)  # expected: 2 * 5 - 1
    assert pace.pair_s(10) == pytest.approx(12.0)
    pace.learn_pair(20, 10.0)  # faster than expected without any settings
    assert pace.pair_s(10) == pytest.approx(9.0)
    alone = size_proof(Pace(5.0, 0.1), 100.0, seen_steps=500)
    together = size_proof(Pace(5.0, 0.1, overlap_s=3.0), 100.0, seen_steps=500)
    assert together.steps > alone.steps


@pytest.mark.parametrize(
    ("left_s", "cycle_steps", "steps"),
    [
        (60.0, 1, None),  # as many as planned
        (27.0, 1, 250),
        (27.0, 119, 241),  # whole cycles behind the warm-up of 3 steps
        (27.0, 300, None),
        (24.6, 1, None),  # of 100 steps, too little would be timed beside the start-ups
        (20.0, 1, None),
    ],
)
def test_a_proof_covers_what_there_is_time_for(
    left_s: float, cycle_steps: int, steps: int | None
) -> None:
    """Three pairs, each of whose runs starts up for 5 s; 2 s of that pass at the same time."""
    pace = Pace(5.0, 0.002, cycle_steps, overlap_s=2.0)
    assert budget.fit_steps(ProofSize(1000, 5, 1), pace, left_s) == steps


def test_a_proof_times_more_than_its_warm_up() -> None:
    pace = Pace(4.0, 0.4, cycle_steps=32, micro_batches=32)
    size = ProofSize(97, 5, 1, warmup_steps=33, shares_gradients=True)
    for left_s in range(60, 200):
        steps = budget.fit_steps(size, pace, left_s)
        assert steps is None or steps - 33 >= 32
