"""What lies between training steps is part of the work that is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from test_memory import STEP as MEMORY_STEP

from flatout.report import words
from flatout.tune import statistics
from flatout.tune.cycles import find_cycle_steps
from flatout.tune.document import Side
from flatout.tune.pairs import Pairs, find_unlike_s, median_step_ms, phases_ms, size_relay, step_ms
from flatout.tune.trial import Trial
from flatout.wire.header import Header
from flatout.wire.ratios import estimate_arm_ratios
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Comparison
from flatout.wire.turns import ARM, FORWARD, PAUSE, Turn, Turns

STEP = replace(MEMORY_STEP, step_ms=10.0)


@pytest.mark.parametrize(("optimizer_ms", "cycle_steps"), [(4.0, 4), (0.4, 1)])
def test_micro_batches_are_a_cycle_if_the_optimizer_step_takes_its_time(
    optimizer_ms: float, cycle_steps: int
) -> None:
    process = ProcessRecord(Path("record"), Header())
    for number in range(30):
        has_update = number == 0 or number % 4 == 3
        phases_ms = {"optimizer": optimizer_ms if has_update else 0.0}
        step = replace(STEP, index=number, at_s=number, updates=has_update, phases_ms=phases_ms)
        process.steps.append(step)
    assert process.micro_batches == 4
    assert find_cycle_steps(process) == cycle_steps


@pytest.mark.parametrize(
    ("long_ms", "unlike_s"),
    [((), 0.0), ((5000.0,), 5.0), ((150.0,) * 3, 0.0), ((300.0,) * 4, 1.2), ((210.0,), 0.0)],
)
def test_steps_unlike_those_that_are_compared(long_ms: Sequence[float], unlike_s: float) -> None:
    """After 600 steps of Adam, one step of L-BFGS took more than half of the job, and a claim from
    the first 200 steps was projected on it."""
    process = ProcessRecord(Path("record"), Header())
    for number, ms in enumerate([10.0] * 600 + list(long_ms)):
        process.steps.append(replace(STEP, index=number, at_s=number, step_ms=ms))
    assert find_unlike_s(process) == pytest.approx(unlike_s)


def record(
    steps: int,
    passes_before: Callable[[int], int],
    update_ms: float = 10.0,
    pass_ms: float = 2.0,
    marks: Sequence[str | None] = (),
) -> ProcessRecord:
    """A process with some evaluation passes before each training step, and after the last."""
    process = ProcessRecord(Path("record"), Header())
    at_s = 0.0
    for number in range(steps + 1):
        mark = marks[number] if number < len(marks) else None
        for _ in range(passes_before(number)):
            one = replace(STEP, at_s=at_s, step_ms=pass_ms, grad=False, mark=mark)
            process.evaluations.append(one)
            at_s += pass_ms / 1e3
        if number < steps:
            process.steps.append(
                replace(STEP, index=number, at_s=at_s, step_ms=update_ms, mark=mark)
            )
            at_s += update_ms / 1e3
    return process


@pytest.mark.parametrize(
    ("steps", "passes_before", "cycle_steps"),
    [
        (100, lambda number: 0, 1),
        (100, lambda number: 3, 1),  # before every step
        (100, lambda number: 50 * (number % 20 == 0), 20),  # rollouts, the first before all steps
        (100, lambda number: 9 * (number == 40), 40),  # one epoch and a part of the next
        (100, lambda number: 9 * (number == 0), 1),  # a sanity check at the beginning
        (100, lambda number: 9 * (number in (30, 61, 92)), 31),
        (100, lambda number: 9 * (number in (30, 60, 100)), 30),
        (100, lambda number: 99 * (number == 100), 1),  # a test at the end of the program
    ],
)
def test_evaluation_passes_show_the_cycle(
    steps: int, passes_before: Callable[[int], int], cycle_steps: int
) -> None:
    assert find_cycle_steps(record(steps, passes_before)) == cycle_steps


def test_passes_that_take_no_time_make_no_cycle() -> None:
    process = record(100, lambda number: int(number % 20 == 0), pass_ms=0.01)
    assert find_cycle_steps(process) == 1


def trial(process: ProcessRecord) -> Trial:
    return Trial(process, 10.0, False)


def rollouts(number: int) -> int:
    return 100 * (number % 20 == 3)


def test_the_claim_counts_what_lies_between_steps() -> None:
    """Updates become faster and rollouts slower: the median step gains what the job loses."""
    bare = trial(record(63, rollouts, update_ms=10.0, pass_ms=2.0))
    plan = trial(record(63, rollouts, update_ms=8.0, pass_ms=3.0))
    pairs = Pairs({}, {"precision": "bf16"}, [bare] * 2, [plan] * 2)
    assert pairs.ratio.value == pytest.approx((20 * 10 + 100 * 2) / (20 * 8 + 100 * 3))
    assert median_step_ms([bare.process]) / median_step_ms([plan.process]) == pytest.approx(1.25)
    assert step_ms(bare.process) == pytest.approx(20.0)
    parts = phases_ms([bare.process], 20.0)
    assert parts["evaluation"] == pytest.approx(10.0)
    sides = [
        Side(
            step_ms=step_ms(one.process),
            median_step_ms=median_step_ms([one.process]),
            phases_ms=phases_ms([one.process], step_ms(one.process)),
        )
        for one in (bare, plan)
    ]
    said = words.compare_parts(*sides)
    assert said is not None
    assert said == (
        "speedup of the median step, without evaluations between steps: 1.25x; "
        "evaluation passes between the steps: 0.67x"
    )
    assert words.compare_parts(sides[0], sides[0]) is None


def test_steps_that_are_not_timed_take_their_passes_with_them() -> None:
    marks = ["first"] * 3 + ["switched", None, None, None] * 10
    process = record(43, lambda number: 1, marks=marks)
    assert step_ms(process) == pytest.approx(12.0)
    assert {step.step_ms for step in process.whole_steps if step.mark is None} == {12.0}
    assert {step.step_ms for step in process.whole_steps if step.mark} == {10.0}


@pytest.mark.parametrize("cycle_steps", [7, 20, 64, 320])
def test_a_relay_times_whole_cycles(cycle_steps: int) -> None:
    relay = size_relay(3 + 2 * cycle_steps, 0.002, cycle_steps)
    assert relay.blocks * relay.block_steps == 2 * cycle_steps
    assert relay.blocks >= 2
    assert relay.discard_steps == 0
    assert relay.warmup_steps == 3


def test_blocks_of_whole_cycles_count_what_their_median_step_does_not_show() -> None:
    """Updates become faster and rollouts slower: the comparison inside one process sees both."""
    comparison = Comparison(arms=({}, {"precision": "bf16"}), block_steps=20, discard_steps=0)
    steps = []
    for block in range(16):
        arm = block % 2
        update_ms, rollout_ms = (9.0, 400.0) if arm else (10.0, 200.0)
        times = [update_ms + rollout_ms, *[update_ms] * 19]
        steps += [replace(STEP, step_ms=ms, arm=arm, block=block) for ms in times]
    blocks = statistics.find_complete_blocks(steps, comparison)
    assert estimate_arm_ratios(blocks)[1].value == pytest.approx(400 / 580, rel=0.01)


def test_a_pause_belongs_to_no_turn() -> None:
    closed: list[Turn] = []

    def close(turn: Turn) -> None:
        closed.append(turn)
        if len(closed) == 1:
            turns.process_note(ARM, 1)

    turns = Turns(close)
    for start in (0, 100, 1200, 1300):
        turns.forward_begins(start, 1, grad=False, training=False)
        if start == 100:  # the agent waits at the boundary that this call shows
            turns.process_note(PAUSE, 1000)
            turns.forward_ends(1140)
        else:
            turns.forward_ends(start + 40)
    durations = [turn.end_ns - turn.start_ns for turn in closed]
    assert durations == [100, 100, 100]
    assert [turn.phases_ns[FORWARD] for turn in closed] == [40, 40, 40]
    assert [turn.block for turn in closed] == [0, 1, 1]
