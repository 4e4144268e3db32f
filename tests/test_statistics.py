"""Intervals on step times that drift, resemble their neighbours, and are skewed."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest

from flatout.agent.switch import block_order
from flatout.tune import design, statistics
from flatout.wire.ratios import (
    Block,
    Ratio,
    Size,
    estimate_arm_ratios,
    estimate_setting_ratios,
    t_quantile,
)
from flatout.wire.record import Step
from flatout.wire.request import Comparison
from flatout.wire.turns import PHASES

DISCARD, BLOCK, ROUNDS = 2, 8, 12


def step(step_ms: float, arm: int | None = None, mark: str | None = None, block: int = 0) -> Step:
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
        block=block,
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
    for block, arm in enumerate(block_order(len(step_ms), ROUNDS), len(step_ms) + 1):
        for number in range(BLOCK):
            switched = number < DISCARD
            extra = 1 + carry_over if switched and arm != last else 1.0
            mark = "switched" if switched else None
            steps.append(step(step_ms[arm] * next(times) * extra, arm, mark, block))
        last = arm
    return steps


def ratios(steps: list[Step]) -> dict[int, Ratio]:
    asked = Comparison(arms=(), block_steps=BLOCK, discard_steps=DISCARD)
    return estimate_arm_ratios(statistics.find_complete_blocks(steps, asked))


def screened(
    slowness: list[float], gains: dict[tuple[str, str], float], rounds: int
) -> dict[tuple[str, str], Ratio]:
    """The ratios of settings with these gains, from stacks of them on a machine this slow."""
    arms = design.build_arms([[setting] for setting in gains])
    times, found = iter(slowness), []
    for arm in block_order(len(arms), rounds):
        gain = math.prod(gains[setting] for setting in arms[arm].items())
        found.append(Block(arm, [10.0 / gain * next(times) for _ in range(4)]))
    return estimate_setting_ratios(found, arms)


def test_a_pair_alone_gives_no_interval() -> None:
    with pytest.raises(ValueError, match="two pairs"):
        statistics.estimate_ratio([0.1])
    assert estimate_arm_ratios([Block(0, [1.0]), Block(1, [1.0])]) == {}
    assert estimate_arm_ratios([]) == {}


def test_the_interval_of_four_pairs_is_that_of_the_textbook() -> None:
    found = statistics.estimate_ratio([math.log(value) for value in (1.4, 1.5, 1.6, 1.7)])
    # t(0.975, 3) = 3.182; standard deviation of the logs 0.08315
    assert found.value == pytest.approx(1.5459, abs=1e-3)
    assert found.low == pytest.approx(1.5459 * math.exp(-3.182 * 0.08315 / 2), rel=1e-3)
    assert found.high == pytest.approx(1.5459 * math.exp(3.182 * 0.08315 / 2), rel=1e-3)
    assert found.pairs == 4


def test_quantiles_of_students_t_are_those_of_the_tables() -> None:
    for freedom, quantile in ((5, 2.571), (8, 2.306), (12, 2.179), (30, 2.042), (1000, 1.962)):
        assert t_quantile(0.975, freedom) == pytest.approx(quantile, rel=0.01)


def test_a_stall_of_a_whole_block_moves_the_ratio_little() -> None:
    slowness = machine(3)
    quiet = ratios(compared(slowness, [11.0, 10.0]))[1]
    stalled = [s * 20 if 83 <= n < 99 else s for n, s in enumerate(slowness)]
    found = ratios(compared(stalled, [11.0, 10.0]))[1]
    assert found.value == pytest.approx(quiet.value, rel=0.03)
    assert found.low > 1


def test_steps_of_many_sizes_are_told_apart_from_what_an_arm_does() -> None:
    """Batches of sentences: rows and length vary, and so does the time, by 16x."""
    covered, widths = 0, {False: [], True: []}
    for seed in range(40):
        draw = random.Random(seed)
        found: dict[bool, list[Block]] = {False: [], True: []}
        for arm in block_order(2, 24):
            for blocks in found.values():
                blocks.append(Block(arm))
            for _ in range(2):
                rows, length = draw.choice((16, 32)), draw.choice((8, 16, 32, 64))
                step_ms = (1.0 + 0.01 * rows * length) / (1, 1.05)[arm] * draw.gauss(1, 0.01)
                found[False][-1].add(step_ms, None)
                found[True][-1].add(step_ms, Size(rows, rows * length))
        for is_known, blocks in found.items():
            ratio = estimate_arm_ratios(blocks)[1]
            widths[is_known].append(math.log(ratio.high / ratio.low))
        covered += ratio.low <= 1.05 <= ratio.high
    assert covered >= 36
    assert fmean(widths[True]) < 0.08 < fmean(widths[False]) / 4


def test_one_size_for_all_steps_changes_nothing() -> None:
    slowness = iter(machine(5))
    plain, sized = [], []
    for arm in block_order(2, 12):
        plain.append(Block(arm, [next(slowness) for _ in range(3)]))
        sized.append(Block(arm, plain[-1].times_ms, [Size(8, 64)] * 3))
    assert estimate_arm_ratios(plain) == estimate_arm_ratios(sized)


def test_arms_that_do_not_take_turns_are_told_apart_less_well() -> None:
    """On a machine that is faster for a while and slower for a while, turns are what helps."""
    widths: dict[bool, list[float]] = {False: [], True: []}
    for seed in range(20):
        draw, walk, logs = random.Random(seed), 0.0, []
        for _ in range(48):
            walk = 0.8 * walk + draw.gauss(0, 0.05)
            logs.append(walk)
        for take_turns in widths:
            arms = list(block_order(2, 24))
            arms = arms if take_turns else sorted(arms)
            found = [Block(arm, [math.exp(log)]) for arm, log in zip(arms, logs, strict=True)]
            ratio = estimate_arm_ratios(found)[1]
            widths[take_turns].append(math.log(ratio.high / ratio.low))
    assert fmean(widths[False]) > 2 * fmean(widths[True])


def test_blocks_are_told_apart_even_when_an_arm_follows_itself() -> None:
    steps = compared([1.0] * 1000, [10.0, 5.0])
    found = statistics.split_into_blocks(steps)
    assert [block.arm for block in found] == list(block_order(2, ROUNDS))
    assert all(len(block.times_ms) == BLOCK - DISCARD for block in found)


def test_the_first_turn_of_an_arm_counts_for_its_warm_up_alone() -> None:
    first = [step(time, 1, "first", 1) for time in (5000.0, 700.0, 5.0)]
    first += [step(time, 2, "first", 2) for time in (4.0, 4.0, 4.0)]
    steps = first + compared([1.0] * 1000, [10.0, 5.0, 4.0])
    found = statistics.split_into_blocks(steps)
    assert [block.arm for block in found] == [1, 2, *block_order(3, ROUNDS)]
    assert ratios(steps)[1].value == pytest.approx(2.0)


def test_a_steady_drift_cancels() -> None:
    drift = [math.exp(number * 0.002) for number in range(1000)]
    found = ratios(compared(drift, [10.0, 5.0, 10.0]))
    assert found[1].value == pytest.approx(2.0, rel=3e-3)
    assert found[2].value == pytest.approx(1.0, rel=3e-3)


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


def test_steps_of_varying_size_favour_no_arm() -> None:
    """Buckets of many lengths, and an epoch that ends with a small batch every 16 steps."""
    faster, slower, tries = 0, 0, 200
    for seed in range(tries):
        draw = random.Random(seed)
        sizes = [draw.choice((1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)) for _ in range(1000)]
        sizes[15::16] = [0.3] * len(sizes[15::16])
        slowness = [one * other for one, other in zip(machine(seed), sizes, strict=True)]
        for ratio in ratios(compared(slowness, [10.0, 10.0, 10.0])).values():
            faster += ratio.low > 1
            slower += ratio.high < 1
    assert faster / tries / 2 < 0.05
    assert slower / tries / 2 < 0.05


def test_a_difference_is_found_where_there_is_one() -> None:
    found = [ratios(compared(machine(seed), [12.0, 10.0]))[1] for seed in range(100)]
    assert fmean(ratio.low > 1 for ratio in found) > 0.9
    assert fmean(ratio.value for ratio in found) == pytest.approx(1.2, rel=0.02)


def test_incomplete_blocks_are_left_out_and_arms_that_were_stopped_keep_their_ratio() -> None:
    steps = compared([1.0] * 1000, [10.0, 5.0, 4.0])
    cut = steps[: 3 + 3 * BLOCK * 5 + BLOCK // 2]  # five rounds and a half block
    assert ratios(cut)[1].pairs == 5
    stopped = [s for n, s in enumerate(steps) if s.arm != 2 or n < 60]
    assert ratios(stopped)[1].value == pytest.approx(2.0)
    assert ratios(stopped)[2].value == pytest.approx(2.5)
    assert ratios(stopped)[2].pairs < ratios(stopped)[1].pairs


def test_stacks_tell_many_settings_apart_in_few_steps() -> None:
    gains = {(f"knob{number}", "on"): 1.0 for number in range(20)}
    gains["real", "on"] = 1.1
    gains["slow", "on"] = 0.9
    found = [screened(machine(seed), gains, 2) for seed in range(10)]
    for seen in found:
        assert seen["real", "on"].low > 1
        assert seen["slow", "on"].high < 1
        assert statistics.pick_winners(seen)[0] == ("real", "on")
    dummies = [r for seen in found for (knob, _), r in seen.items() if knob.startswith("knob")]
    assert fmean(ratio.low <= 1 <= ratio.high for ratio in dummies) > 0.85


def test_settings_that_exclude_each_other_are_never_together() -> None:
    arms = design.build_arms([[("precision", "bf16"), ("precision", "safe")], [("gc", "off")]])
    assert arms[0] == {}
    assert {arm.get("precision") for arm in arms} == {None, "bf16", "safe"}
    claims = design.build_arms([[("compile", "on"), ("memory_format", "channels_last")]])
    assert all(len(arm) < 2 for arm in claims)
    with pytest.raises(ValueError, match="at most 47"):
        design.build_arms([[(f"knob{number}", "on")] for number in range(48)])


@pytest.mark.parametrize("factors", [1, 3, 4, 7, 11, 12, 23, 30, 47])
def test_each_setting_is_on_in_half_of_the_stacks_whatever_the_others_are(factors: int) -> None:
    arms = design.build_arms([[(f"knob{number}", "on")] for number in range(factors)])
    on = [[f"knob{number}" in arm for arm in arms] for number in range(factors)]
    for column in on:
        assert sum(column) * 2 == len(arms)
    for one in range(factors):
        for other in range(one):
            together = sum(a and b for a, b in zip(on[one], on[other], strict=True))
            assert together * 4 == len(arms)


@pytest.mark.parametrize("options", [(2, 2, 2, 1, 1, 1), (2,) * 7, (3, 3, 3), (2, 2), (4, 3, 2, 1)])
def test_alternatives_can_be_told_apart(options: tuple[int, ...]) -> None:
    """Dealt out in turn, settings of two factors went together, and nothing was known of any."""
    factors = [
        [(f"knob{number}", str(option)) for option in range(count)]
        for number, count in enumerate(options)
    ]
    arms = design.build_arms(factors)
    assert arms == design.build_arms(factors)
    settings = [setting for options in factors for setting in options]
    gains = {setting: 1.0 + 0.05 * number for number, setting in enumerate(settings)}
    noise = random.Random(0)
    found = []
    for arm in block_order(len(arms), 12):
        gain = math.prod(gains[setting] for setting in arms[arm].items())
        found.append(Block(arm, [10.0 / gain * noise.gauss(1.0, 0.001) for _ in range(4)]))
    ratios = estimate_setting_ratios(found, arms)
    assert {s: r.value for s, r in ratios.items()} == pytest.approx(gains, rel=0.01)


def test_pairs_compare_each_step_with_its_own_counterpart() -> None:
    sizes = random.Random(0).choices((1.0, 2.0, 4.0, 8.0), k=20)
    bare = [10 * size for size in sizes]
    plan = [8 * size for size in sizes[:12]]
    [(bare_ms, plan_ms)] = statistics.paired_means_ms([list(zip(bare, plan, strict=False))])
    assert bare_ms / plan_ms == pytest.approx(1.25)
    with pytest.raises(ValueError, match="a step of each"):
        statistics.paired_means_ms([[]])


def test_a_slow_step_counts_if_it_is_slow_in_most_pairs() -> None:
    usual = [(10.0, 5.0)] * 19
    stalled, saving = (10.0, 80.0), (100.0, 100.0)
    once = statistics.paired_means_ms([[*usual, stalled], [*usual, (10.0, 5.0)]])
    assert once == [(10.0, 5.0), (10.0, 5.0)]
    in_all = statistics.paired_means_ms([[*usual, saving]] * 3)
    assert in_all == [pytest.approx((14.5, 9.75))] * 3


def test_pairs_are_enough_when_the_interval_is_narrow_or_there_is_no_gain() -> None:
    narrow = [0.10, 0.11, 0.09, 0.10, 0.11]
    wide = [0.0, 0.3, -0.1, 0.2, 0.4]
    assert not statistics.has_enough_pairs(narrow[:4], 12)
    assert statistics.has_enough_pairs(narrow, 12)
    assert statistics.has_enough_pairs([0.0, 0.01, -0.01, 0.0, 0.01], 12)
    assert not statistics.has_enough_pairs(wide, 12)
    assert statistics.has_enough_pairs(wide, 5)
    assert statistics.has_enough_pairs([log - 0.5 for log in wide], 12)


def test_winners_are_likely_to_be_faster_and_parts_that_cost_nothing_to_drop_are_redundant() -> (
    None
):
    found = {
        "a": Ratio(1.1, 1.05, 1.15, 9),
        "b": Ratio(1.3, 0.85, 1.9, 9),
        "c": Ratio(1.5, 1.4, 1.6, 9),
    }
    assert statistics.pick_winners(found) == ["c", "a"]
    without = {
        "needed": Ratio(0.8, 0.75, 0.85, 9),
        "unclear": Ratio(0.98, 0.93, 1.03, 9),
        "useless": Ratio(1.0, 0.985, 1.015, 9),
        "harmful": Ratio(1.1, 1.05, 1.15, 9),
    }
    assert statistics.find_redundant(without) == ["harmful", "useless"]


@pytest.mark.parametrize(
    ("ratios", "ranked", "faster"),
    [
        ([1.03, 1.02], False, True),
        ([1.03, 1.02, 1.05], True, True),
        ([0.99, 0.98, 0.9], True, False),
        ([1.03, 0.86, 1.03], False, False),
        ([1.03, 0.86, 1.03, 1.02], False, False),
        ([1.03, 0.86, 1.03, 1.02, 1.03], True, True),  # the mean is below 1
        ([0.98, 1.2, 0.98, 0.97, 0.99], True, False),
    ],
)
def test_a_setting_is_ranked_by_most_of_its_pairs(
    ratios: list[float], ranked: bool, faster: bool
) -> None:
    logs = [math.log(ratio) for ratio in ratios]
    assert statistics.is_ranked(logs) == ranked
    assert statistics.is_probably_faster(logs) == faster
