"""Intervals on step times that drift, resemble their neighbours, and are skewed."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from flatout.agent.switch import block_order
from flatout.record import Step
from flatout.tune import statistics
from flatout.turns import PHASES

DISCARD, BLOCK, ROUNDS = 2, 8, 12


def step(step_ms: float, arm: int | None = None, mark: str | None = None) -> Step:
    return Step(
        index=0,
        at_s=0.0,
        step_ms=step_ms,
        phases_ms=dict.fromkeys(PHASES, 0.0),
        losses=(),
        forwards=1,
        backwards=1,
        updates=1,
        minor_faults=None,
        major_faults=None,
        peak_rss_bytes=None,
        peak_device_bytes=None,
        arm=arm,
        mark=mark,
        grad=True,
    )


def machine(seed: int) -> list[float]:
    """How slow a shared machine is at each of 1,000 steps: a slow walk and rare long stalls."""
    draw = random.Random(seed)
    speed, walk = [], 0.0
    for _ in range(1000):
        walk = 0.995 * walk + draw.gauss(0, 0.02)
        stall = draw.expovariate(1 / 0.8) if draw.random() < 0.04 else 0.0
        speed.append(math.exp(walk + abs(draw.gauss(0, 0.03))) + stall)
    return speed


def compared(slowness: list[float], step_ms: list[float], carry_over: float = 0.0) -> list[Step]:
    """The record of a comparison of arms with these step times on a machine this slow."""
    steps, last = [step(50.0), step(10.0), step(10.0)], -1
    times = iter(slowness)
    for arm in block_order(len(step_ms), ROUNDS):
        for number in range(BLOCK):
            switched = number < DISCARD
            extra = 1 + carry_over if switched and arm != last else 1.0
            steps.append(
                step(step_ms[arm] * next(times) * extra, arm, "switched" if switched else None)
            )
        last = arm
    return steps


def ratios(steps: list[Step]) -> dict[int, statistics.Ratio]:
    found = statistics.blocks(steps, DISCARD)
    return dict(statistics.in_process_ratios(found, BLOCK - DISCARD))


def test_a_pair_alone_gives_no_interval() -> None:
    for interval in (statistics.claimed, statistics.in_sequence):
        with pytest.raises(ValueError, match="two pairs"):
            interval([0.1])


def test_the_interval_of_four_pairs_is_that_of_the_textbook() -> None:
    found = statistics.claimed([math.log(value) for value in (1.4, 1.5, 1.6, 1.7)])
    # t(0.975, 3) = 3.182; standard deviation of the logs 0.08315
    assert found.value == pytest.approx(1.5459, abs=1e-3)
    assert found.low == pytest.approx(1.5459 * math.exp(-3.182 * 0.08315 / 2), rel=1e-3)
    assert found.high == pytest.approx(1.5459 * math.exp(3.182 * 0.08315 / 2), rel=1e-3)
    assert found.pairs == 4


def test_the_signed_rank_interval_is_that_of_the_tables() -> None:
    # Critical values of W for a two-sided 5 % test with 6 to 12 pairs: 0 2 3 5 8 10 13.
    pairs = range(6, 13)
    assert [statistics._critical_rank(count) for count in pairs] == [0, 2, 3, 5, 8, 10, 13]
    assert statistics._critical_rank(5) is None
    logs = [0.3, 0.1, 0.2, -0.05, 0.15, 0.25]
    found = statistics.in_sequence(logs)
    assert found.low == pytest.approx(math.exp(min(logs)))
    assert found.high == pytest.approx(math.exp(max(logs)))


def test_a_stall_of_a_whole_block_costs_one_pair_only() -> None:
    logs = [0.10, 0.11, 0.09, -3.0, 0.12, 0.08, 0.10, 0.11, 0.09, 0.10, 0.12, 0.08]
    found = statistics.in_sequence(logs)
    assert found.value == pytest.approx(math.exp(0.1), rel=0.01)
    assert found.low > 1
    assert statistics.claimed(logs).low < 1


def test_neighbours_that_resemble_each_other_widen_the_interval() -> None:
    walk = [0.0, 0.1, 0.2, 0.3, 0.3, 0.2, 0.1, 0.0]
    shuffled = [0.0, 0.3, 0.1, 0.2, 0.0, 0.3, 0.1, 0.2]
    close, independent = statistics.in_sequence(walk), statistics.in_sequence(shuffled)
    assert close.low < independent.low < independent.high < close.high


def test_blocks_are_told_apart_even_when_an_arm_follows_itself() -> None:
    steps = compared([1.0] * 1000, [10.0, 5.0])
    found = statistics.blocks(steps, DISCARD)
    assert [arm for arm, _ in found] == list(block_order(2, ROUNDS))
    assert all(len(times) == BLOCK - DISCARD for _, times in found)


def test_a_steady_drift_cancels() -> None:
    drift = [math.exp(number * 0.002) for number in range(1000)]
    found = ratios(compared(drift, [10.0, 5.0, 10.0]))
    assert found[1].value == pytest.approx(2.0, rel=1e-3)
    assert found[2].value == pytest.approx(1.0, rel=1e-3)


def test_the_first_steps_after_a_switch_do_not_count() -> None:
    found = ratios(compared([1.0] * 1000, [10.0, 5.0], carry_over=3.0))
    assert found[1].value == pytest.approx(2.0)


def test_stalls_do_not_move_the_ratio() -> None:
    slowness = [1.0] * 1000
    for stalled in range(20, 200, 20):
        slowness[stalled] = 30.0
    assert ratios(compared(slowness, [10.0, 8.0]))[1].value == pytest.approx(1.25)


def test_no_difference_is_found_where_there_is_none() -> None:
    """95 % intervals may miss 1 in 5 % of the cases; a gain is the half of them."""
    gains, covered, tries = 0, 0, 300
    for seed in range(tries):
        found = ratios(compared(machine(seed), [10.0, 10.0]))[1]
        gains += found.low > 1
        covered += found.low <= 1 <= found.high
    assert covered / tries > 0.92
    assert gains / tries < 0.04


def test_a_difference_is_found_where_there_is_one() -> None:
    found = [ratios(compared(machine(seed), [12.0, 10.0]))[1] for seed in range(100)]
    assert fmean(ratio.low > 1 for ratio in found) > 0.9
    assert fmean(ratio.value for ratio in found) == pytest.approx(1.2, rel=0.02)


def test_incomplete_rounds_and_arms_that_were_stopped_are_left_out() -> None:
    steps = compared([1.0] * 1000, [10.0, 5.0, 4.0])
    cut = steps[: 3 + 3 * BLOCK * 5 + BLOCK // 2]  # five rounds and a half block
    assert ratios(cut)[1].pairs == 2
    stopped = [s for n, s in enumerate(steps) if s.arm != 2 or n < 60]
    assert set(ratios(stopped)) == {1}
    assert ratios(stopped)[1].value == pytest.approx(2.0)


def test_the_typical_step_is_the_median_after_the_warm_up() -> None:
    steps = [step(900.0), step(10.0), step(11.0), step(90.0), step(12.0, mark="profiled")]
    assert statistics.typical_step_ms(steps, 1) == 11.0
    with pytest.raises(ValueError, match="leave none"):
        statistics.typical_step_ms(steps, 5)
