"""What counts of a comparison on a machine that others use too: decisions on made-up times."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_memory import STEP

from flatout.launch import Finished
from flatout.machine.usage import Usage
from flatout.tune import quiet, statistics
from flatout.tune.neighbours import Neighbours
from flatout.tune.pairs import Pairs, to_user_error
from flatout.tune.prover import MAXIMUM_PAIRS, Prover
from flatout.tune.quiet import Block
from flatout.tune.trial import Trial, TrialFailedError, _to_entry
from flatout.tune.tuner import _explain_no_gain
from flatout.wire.disturbance import Stretch
from flatout.wire.header import Header
from flatout.wire.lines import CpuUsage
from flatout.wire.record import ProcessRecord

ALONE, BUSY = Stretch(0.01, 0.0), Stretch(0.5, 0.6)
IDLE_PRIORITY, UNKNOWN = Stretch(0.4, 0.01), Stretch(None, None)


def block(
    baseline: Stretch = ALONE, variant: Stretch = ALONE, place: int = 0, gain: float = 1.0
) -> Block:
    return Block((place, place + 1), gain, 1.0, baseline, variant)


def test_a_block_counts_if_neither_of_its_parts_was_disturbed() -> None:
    assert block().counts(needs_quiet=False)
    assert not block(BUSY).counts(needs_quiet=False)
    assert not block(variant=BUSY).counts(needs_quiet=False)
    assert block(IDLE_PRIORITY, UNKNOWN).counts(needs_quiet=False)


@pytest.mark.parametrize("taken", [None, 0.01, 0.48])
def test_a_trial_that_others_hold_up_tells_nothing_of_its_settings(taken: float | None) -> None:
    stopped = Finished(Path("run"), -9, 60.0, "", timed_out=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finished, "read_record", lambda _: SimpleNamespace(main=None))
        entry = _to_entry(stopped, 60.0, 100.0, taken)
    assert entry.failure is not None
    failure = TrialFailedError(entry.failure, None, "its last lines")
    assert "it was stopped after 60 s, far longer than expected" in entry.failure
    assert failure.is_due_to_others == (taken == 0.48)
    said = str(to_user_error("the program fails when it runs again", failure))
    if taken == 0.48:
        assert said == (
            "not measurable now: it was stopped after 60 s, far longer than expected, and others "
            "took 48% of the CPUs that this job may use"
        )
    else:
        assert said.startswith("the program fails when it runs again: it was stopped")
        assert said.endswith("its last lines")


def test_floors_count_by_their_time() -> None:
    """The rollouts of reinforcement learning take most of the time, in few blocks, and gain."""
    draw = random.Random(0)

    def pair() -> list[Block]:
        return [
            Block(
                (n, n + 1),
                s * draw.uniform(1, 1.02),
                s / gain * draw.uniform(1, 1.02),
                ALONE,
                ALONE,
            )
            for n, (s, gain) in enumerate([(0.01, 1.0)] * 18 + [(1.0, 1.3)] * 2)
        ]

    pairs = [pair() for _ in range(3)]
    floors = quiet.estimate_floor_ratio(pairs)
    assert floors is not None
    assert floors.value == pytest.approx(1.28, abs=0.03)
    assert quiet.find_contradiction(pairs) is None


def test_fewer_threads_count_only_where_others_are_known_to_be_quiet() -> None:
    assert quiet.needs_quiet({}, {"threads": "one"})
    assert quiet.needs_quiet({"threads": "one"}, {"gc": "seldom"})
    assert not quiet.needs_quiet({"threads": "one"}, {"threads": "one", "gc": "seldom"})
    assert block().counts(needs_quiet=True)
    assert not block(IDLE_PRIORITY).counts(needs_quiet=True)
    assert not block(variant=UNKNOWN).counts(needs_quiet=True)


def test_a_pair_counts_if_enough_of_its_blocks_do() -> None:
    assert len(quiet.select([block()] * 2 + [block(BUSY)] * 6, needs_quiet=False)) == 2
    assert quiet.select([block()] + [block(BUSY)] * 7, needs_quiet=False) == []


def pair(gain: float, noise: float = 0.0, blocks: int = 8) -> list[Block]:
    """A quiet pair in which the means and the fastest times tell the same."""
    return [block(place=n, gain=gain * (1 + noise * math.sin(9 * n))) for n in range(blocks)]


def test_a_quiet_gain_is_measurable() -> None:
    found = quiet.assess([pair(1.2 + 0.01 * n, 0.02) for n in range(5)], needs_quiet=False)
    assert found.why_not_measurable is None
    assert (found.counted, found.blocks_share) == (5, 1.0)
    assert found.taken == pytest.approx(0.01)


def test_nothing_is_measurable_while_others_use_the_cpus() -> None:
    busy = [[block(BUSY, BUSY, place=n, gain=5.0) for n in range(8)]] * 5
    found = quiet.assess(busy, needs_quiet=False)
    assert found.why_not_measurable == (
        "not measurable now: 0 of 5 pairs were quiet enough, and others took 50% of the CPUs that "
        "this job may use"
    )


def test_a_gain_that_only_the_slow_times_show_is_not_claimed() -> None:
    """Accounting showed nothing, but bare was slow now and then, and fast it was as fast as the
    plan."""
    pairs = [
        [
            block(place=place, gain=2.0 + number / 9 if (number + place) % 3 else 0.99)
            for place in range(8)
        ]
        for number in range(6)
    ]
    assert statistics.estimate_ratio([quiet.log_ratio(one) for one in pairs]).low > 1.5
    why = quiet.find_contradiction(pairs)
    assert why is not None
    assert why.startswith("the means give 1.84x")


def test_more_noise_on_one_side_is_no_contradiction() -> None:
    """The fastest of noisy times lie further below their mean than those of steady times."""
    draw = random.Random(0)
    pairs = [
        [
            dataclasses.replace(block(place=n), baseline_s=1.2 * math.exp(draw.gauss(0, 0.06)))
            for n in range(30)
        ]
        for _ in range(12)
    ]
    means = statistics.estimate_ratio([quiet.log_ratio(one) for one in pairs])
    floors = quiet.estimate_floor_ratio(pairs)
    assert floors is not None
    assert floors.high < means.low
    assert quiet.find_contradiction(pairs) is None


def test_a_gain_that_is_far_smaller_in_the_fastest_times_is_not_claimed() -> None:
    """Ten times by the means, a third by the fastest times."""
    slow = [
        [block(place=n, gain=1.3 if (n + k) % 3 == 0 else 14.0) for n in range(9)] for k in range(6)
    ]
    assert "the means give 9.7" in (quiet.find_contradiction(slow) or "")


def test_what_a_program_does_at_a_certain_step_is_no_contradiction() -> None:
    """The plan speeds up an evaluation that comes once in a run; all other steps stay the same."""
    pairs = [
        [*pair(1 + k / 500, blocks=7), Block((7, 8), 5.0, 2.0, ALONE, ALONE)] for k in range(5)
    ]
    assert statistics.estimate_ratio([quiet.log_ratio(one) for one in pairs]).low > 1.3
    assert quiet.find_contradiction(pairs) is None


# Records of runs


def record(step_ms: float, waited: float, others: float, blocks: int = 1) -> ProcessRecord:
    """A run of 40 steps on two CPUs, with constant rates of waiting and of the work of others."""
    process = ProcessRecord(Path(), Header())
    for number in range(40):
        process.steps.append(
            dataclasses.replace(
                STEP,
                index=number,
                at_s=number * step_ms / 1e3,
                step_ms=step_ms,
                block=number * blocks // 40,
            )
        )
    for number in range(round(0.16 * step_ms) + 2):
        at_s = number / 4
        process.usage.append(
            CpuUsage(at_s, 2, at_s, waited_s=waited * at_s, idle_s=(1 - others) * at_s)
        )
    return process


def pairs_of(gain: float, waited: float, others: float, count: int, knob: str = "gc") -> Pairs:
    settings = {"gc": "seldom", "threads": "one"}
    bare = Trial(record(100.0 * gain, waited, others), 1.0, False)
    plan = [Trial(record(100.0 + n, waited, others), 1.0, False) for n in range(count)]
    return Pairs({}, {knob: settings[knob]}, [bare] * count, plan)


def test_the_blocks_of_runs_one_after_the_other() -> None:
    found = quiet.find_blocks(record(100.0, 0.0, 0.0), record(50.0, 0.0, 0.0), in_relay=False)
    assert [one.positions for one in found] == [(0, 8), (8, 16), (16, 24), (24, 32), (32, 37)]
    assert found[0].baseline_s == pytest.approx(0.8)
    assert found[0].variant_s == pytest.approx(0.4)


def test_the_blocks_of_a_relay_are_those_in_which_it_alternated() -> None:
    found = quiet.find_blocks(
        record(1.0, 0.0, 0.0, blocks=4), record(2.0, 0.0, 0.0, blocks=4), in_relay=True
    )
    assert [one.positions for one in found] == [(0, 7), (7, 17), (17, 27), (27, 37)]


def test_a_claim_beside_other_work_is_none() -> None:
    busy = pairs_of(5.0, waited=0.8, others=0.9, count=5)
    assert busy.ratio.value > 4  # it is told, but not claimed
    why = _explain_no_gain(busy, None)
    assert why is not None
    assert why.startswith("no claim: not measurable now: 0 of 5 pairs were quiet enough")
    assert _explain_no_gain(pairs_of(5.0, waited=0.0, others=0.0, count=5), None) is None


def test_threads_are_claimed_only_beside_nothing() -> None:
    beside_idle = {"gain": 2.0, "waited": 0.0, "others": 0.5, "count": 5}
    assert _explain_no_gain(pairs_of(**beside_idle), None) is None  # type: ignore[arg-type]
    threads = pairs_of(**beside_idle, knob="threads")  # type: ignore[arg-type]
    assert "not measurable now" in (_explain_no_gain(threads, None) or "")
    alone = pairs_of(2.0, waited=0.0, others=0.02, count=5, knob="threads")
    assert _explain_no_gain(alone, None) is None


def is_enough(pairs: Pairs, has_time: bool = True) -> bool:
    asked: Any = SimpleNamespace(
        _bare=SimpleNamespace(proof=SimpleNamespace(pairs=5)),
        _ledger=SimpleNamespace(has_time_for=lambda seconds: has_time),
        _pair_s=1.0,
        _has_other_data_order=lambda pairs: True,
    )
    return Prover._is_enough(asked, pairs)


def test_disturbed_pairs_are_made_up_for_while_the_budget_lasts() -> None:
    assert is_enough(pairs_of(1.5, waited=0.0, others=0.0, count=5))
    disturbed = pairs_of(1.5, waited=0.5, others=0.9, count=9)
    assert not is_enough(disturbed)
    assert is_enough(disturbed, has_time=False)
    assert is_enough(pairs_of(1.5, waited=0.5, others=0.9, count=MAXIMUM_PAIRS))


# Waiting for a quiet stretch


class Machine:
    """Two CPUs of which others take a share, as time goes on."""

    def __init__(self, taken: list[float]) -> None:
        self.said: list[str] = []
        self._taken = taken
        self._now_s = self._idle_s = 0.0

    def read(self) -> Usage:
        now_ns = round(self._now_s * 1e9)
        return Usage(now_ns, 2, 0.0, None, None, self._idle_s, None, None, None)

    def sleep(self, seconds: float) -> None:
        taken = self._taken.pop(0) if len(self._taken) > 1 else self._taken[0]
        self._now_s += seconds
        self._idle_s += 2 * seconds * (1 - taken)

    def neighbours(self, budget_s: float = 300.0) -> Neighbours:
        return Neighbours(budget_s, self.said.append, self.read, self.sleep)


def test_a_quiet_machine_is_not_waited_for() -> None:
    machine = Machine([0.02])
    machine.neighbours().before_trial()
    assert machine.said == []
    assert machine.read().at_ns < 0.5e9


def test_others_are_said_at_once_and_waited_for() -> None:
    machine = Machine([0.45, 0.5, 0.5, 0.03])
    machine.neighbours().before_trial()
    assert machine.said == [
        "other processes use 45% of the 2 CPUs that this job may use; waiting until they use less, "
        "for at most 15.0 s in all",
        "the CPUs are quiet after 3.0 s",
    ]


def test_waiting_takes_a_bounded_share_of_the_budget() -> None:
    machine = Machine([0.45])
    watched = machine.neighbours(budget_s=100.0)
    for _ in range(9):
        watched.before_trial()
        machine.sleep(10.0)
        watched.after_trial()
    assert machine.read().at_ns == pytest.approx((9 * 10 + 5 + 0.3) * 1e9)
    assert machine.said[1:] == [
        "other processes still use 45% of the CPUs; going on: steps that they disturb do not count"
    ]


def test_where_nothing_is_told_nothing_is_waited_for() -> None:
    machine = Machine([0.9])
    unknown = Neighbours(
        300.0, machine.said.append, lambda: machine.read()._replace(idle_s=None), machine.sleep
    )
    unknown.before_trial()
    unknown.after_trial()
    unknown.before_trial()
    assert machine.said == []


def test_what_others_take_is_averaged_over_the_time_of_all_trials() -> None:
    machine = Machine([0.0, 0.0, 0.6])
    watched = machine.neighbours(budget_s=0.0)
    assert watched.mean_taken is None
    for _ in range(3):
        watched.before_trial()
        machine.sleep(10.0)
        watched.after_trial()
    assert watched.mean_taken == pytest.approx(0.4)


PROGRAM = """
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
optimizer = torch.optim.AdamW(net.parameters())
for _ in range(100000):
    loss = net(torch.randn(64, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.measured
def test_beside_work_that_never_stops_no_gain_is_claimed(tmp_path: Path) -> None:
    """One thread seems several times as fast as two that wait for each other."""
    (tmp_path / "program.py").write_text(PROGRAM)
    words = "tune --in-place --budget 40s --knobs threads,optimizer,gc -- python program.py"
    environment = {**os.environ, "FLATOUT_HOME": str(tmp_path / "home")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with contextlib.ExitStack() as stack:
        for _ in range(os.cpu_count() or 1):
            others = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(others.wait)
            stack.callback(others.kill)
        done = subprocess.run(
            [sys.executable, "-m", "flatout", *words.split()],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert "that this job may use; waiting for a quiet stretch" in done.stderr
    assert "no plan written: " in done.stderr
    assert "faster: " not in done.stderr
    assert not (tmp_path / "flatout.toml").exists()
