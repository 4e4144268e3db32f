"""Comparisons inside one process: real programs, under the agent, with real knobs."""

from __future__ import annotations

import math
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import cast

import forking
import pytest

from flatout.agent.learning import Learner
from flatout.agent.switch import Switch, block_order
from flatout.agent.usage import UsageLog
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.tune import design
from flatout.wire.lines import CpuUsage, LearnedSettings
from flatout.wire.ratios import estimate_arm_ratios
from flatout.wire.record import ProcessRecord, read_run
from flatout.wire.request import RUN_VARIABLE, Comparison, Request
from flatout.wire.turns import Turn

BARE: dict[str, str] = {}
BF16 = {"precision": "bf16"}
FUSED = {"optimizer": "fused"}

PREAMBLE = """
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.manual_seed(0)
class Net(nn.Sequential):
    def forward(self, x):
        seen.append("bfloat16" if torch.is_autocast_enabled("cpu") else "float32")
        return super().forward(x)
net = Net(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
x = torch.randn(16, 8)
seen = []
"""

LOOP = """
for number in range(1000):
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def run(tmp_path: Path, program: str, comparison: Comparison) -> ProcessRecord:
    Request(comparison=comparison).write(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(PREAMBLE + program)
    completed = forking.run(
        [sys.executable, script],
        env={**os.environ, RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    process = read_run(tmp_path).main
    assert process is not None
    return process


def test_drift_cancels_in_each_pair_of_rounds() -> None:
    for arms in (2, 3, 5):
        order = list(block_order(arms, 8))
        assert len(order) == 8 * arms
        for start in range(0, len(order), 2 * arms):
            pair = order[start : start + 2 * arms]
            positions = {arm: sum(n for n, a in enumerate(pair) if a == arm) for arm in range(arms)}
            assert set(positions.values()) == {2 * arms - 1}
    assert {list(block_order(3, 6))[start] for start in (0, 6, 12)} == {0, 1, 2}


class Scripted:
    """The host of a program whose step times are known, and a machine that is never the same."""

    def __init__(
        self,
        gains: dict[str, float],
        failing: str | None = None,
        breaking: str | None = None,
    ) -> None:
        self.arm: int | None = None
        self.mark: str | None = None
        self.failures: dict[str, str] = {}
        self.forward_wrappers: list[object] = []
        self.roots: list[object] = []
        self.said: list[tuple[str, str, str]] = []
        self.arms: list[int | None] = []
        self.on: list[str] = []
        self.record = self.applied = self.events = self
        self._gains = gains
        self.tried: Counter[str] = Counter()
        self._failing = failing
        self._breaking = breaking
        self._draw = random.Random(0)

    def add_pause(self, since_ns: int) -> None:
        """Its steps have no clock."""

    def apply(self, knob: str, setting: str) -> None:
        name = f"{knob}={setting}"
        self.tried[name] += 1
        if name == self._failing:
            raise RefusedError("not here")
        if name == self._breaking:
            self.failures[knob] = "it broke"
        self.on.append(knob)

    def flush(self) -> None:
        pass

    def counts_as_step(self, turn: Turn) -> bool:
        return True

    def undo(self, knob: str) -> None:
        if knob in self.on:
            self.on.remove(knob)

    def add(self, what: str, subject: str, why: str, trace: str | None = None) -> None:
        self.said.append((what, subject, why))

    def compare(self, comparison: Comparison) -> None:
        switch = Switch(cast(Host, self), comparison)
        is_over = False
        while not is_over:
            turn = Turn(0)
            gain = math.prod(self._gains.get(knob, 1.0) for knob in self.on)
            turn.end_ns = round(1e7 / gain * math.exp(self._draw.gauss(0, 0.04)))
            self.arms.append(self.arm)
            is_over = switch.at_boundary(turn)

    def reasons(self, what: str) -> dict[str, str]:
        return {subject: why for kind, subject, why in self.said if kind == what}


def arms_of(*knobs: str) -> tuple[dict[str, str], ...]:
    return (BARE, *({knob: "on"} for knob in knobs))


def test_arms_without_a_gain_leave_and_the_rest_goes_on_in_mirrored_rounds() -> None:
    session = Scripted({"a": 1.2, "b": 0.8, "d": 1.021})
    comparison = Comparison(
        arms=arms_of("a", "b", "c", "d"), block_steps=4, discard_steps=1, rounds=60, decide="arms"
    )
    session.compare(comparison)
    left = session.reasons("stopped")
    assert left.keys() >= {"arm 2", "arm 3"}
    assert "arm 1" not in left
    assert "less than 1.02x" in left["arm 2"]
    assert len(session.arms) < comparison.longest_steps
    blocks = session.arms[3 + 4 * 3 :: 4]
    compared = []
    while blocks:  # the pairs of rounds, each its own mirror image
        half = next(
            n for n in range(1, 6) if 0 in blocks[:n] and blocks[n : 2 * n] == blocks[:n][::-1]
        )
        compared.append(set(blocks[:half]))
        blocks = blocks[2 * half :]
    assert compared[0] == {0, 1, 2, 3, 4}
    assert 2 not in compared[-1]
    assert all(before >= after for before, after in pairwise(compared))


def test_the_fastest_alone_stays_where_that_is_asked() -> None:
    session = Scripted({"a": 1.2, "b": 1.5, "c": 1.1})
    session.compare(
        Comparison(arms=arms_of("a", "b", "c"), block_steps=4, rounds=60, decide="fastest")
    )
    left = session.reasons("stopped")
    assert left.keys() == {"arm 1", "arm 3"}
    assert all("slower than arm 2" in why for why in left.values())
    assert len(session.arms) < 200


def test_stacks_are_compared_until_each_setting_is_decided() -> None:
    gains = {"a": 1.2, "b": 0.9, "c": 1.0, "d": 1.3}
    arms = design.build_arms([[(knob, "on")] for knob in (*gains, "broken")])
    session = Scripted(gains, failing="broken=on")
    comparison = Comparison(arms, block_steps=4, discard_steps=1, rounds=40, decide="settings")
    session.compare(comparison)
    assert session.reasons("failed") == {"broken=on": "not here"}
    assert session.reasons("stopped") == {}
    assert set(session.arms) - {None} == set(range(len(arms)))
    assert len(session.arms) < comparison.longest_steps / 2


@pytest.mark.parametrize("fewest", [2, 30])
def test_a_comparison_ends_when_its_time_is_over(
    monkeypatch: pytest.MonkeyPatch, fewest: int
) -> None:
    """It takes 6 s to apply the setting, and there are 50 s."""
    apply = Scripted.apply
    now_s = 0.0

    def apply_slowly(self: Scripted, knob: str, setting: str) -> None:
        nonlocal now_s
        now_s += 6.0
        apply(self, knob, setting)

    monkeypatch.setattr(Scripted, "apply", apply_slowly)
    monkeypatch.setattr("flatout.agent.switch.time.perf_counter_ns", lambda: int(now_s * 1e9))
    session = Scripted({})
    comparison = Comparison(
        arms_of("a"),
        block_steps=4,
        first_steps=0,
        rounds=60,
        most_seconds=50.0,
        fewest_rounds=fewest,
    )
    session.compare(comparison)
    rounds, rest = divmod(len(session.arms) - comparison.warmup_steps, 2 * comparison.block_steps)
    assert (rounds % 2, rest) == (0, 0)
    if fewest == 2:
        assert 2 < rounds < 30
        assert 50 < now_s <= 50 + 2 * 6
    else:
        assert rounds == fewest


class Beside(Scripted):
    """The same on two CPUs that others use too, with readings of CPU time.

    Args:
        gains: as in ``Scripted``.
        is_waited: whether the program waits for others while an arm runs, and is slow.
        taken: the share of the CPUs that others take all the time; ``None``: not measured.
    """

    def __init__(
        self,
        gains: dict[str, float],
        is_waited: Callable[[int | None], bool],
        taken: float | None,
    ) -> None:
        super().__init__(gains)
        self.lines: list[object] = []
        self._is_waited = is_waited
        self._taken = taken
        self._now_s = self._waited_s = 0.0

    def write(self, line: object) -> None:
        self.lines.append(line)

    def seconds(self, at_ns: int) -> float:
        return at_ns / 1e9

    def note(self) -> CpuUsage:
        idle_s = None if self._taken is None else (1 - 2 * self._taken) * self._now_s
        return CpuUsage(self._now_s, 2, self._now_s, self._waited_s, idle_s=idle_s)

    def compare_beside(self, comparison: Comparison, kind: type[Switch] = Switch) -> Switch:
        switch = kind(cast(Host, self), comparison, cast(UsageLog, self))
        is_over = False
        while not is_over:
            turn = Turn(round(self._now_s * 1e9))
            is_waited = self._is_waited(self.arm)
            gain = math.prod(self._gains.get(knob, 1.0) for knob in self.on)
            seconds = 0.1 / gain * math.exp(self._draw.gauss(0, 0.01)) * (3 if is_waited else 1)
            self._now_s += seconds
            self._waited_s += seconds / 2 if is_waited else 0
            turn.end_ns = round(self._now_s * 1e9)
            self.arms.append(self.arm)
            is_over = switch.at_boundary(turn)
        return switch


def test_a_block_that_others_disturb_does_not_count() -> None:
    """Others are busy whenever bare runs in the first half: the other arm only seems faster."""
    session: Beside
    session = Beside({}, lambda arm: arm == 0 and len(session.arms) < 80, taken=0.3)
    comparison = Comparison(arms_of("a"), block_steps=4, discard_steps=1, rounds=20)
    switch = session.compare_beside(comparison)
    counted = switch._find_counting_blocks()
    assert 20 < len(counted) < len(switch.blocks)
    (ratio,) = estimate_arm_ratios(counted).values()
    assert ratio.low < 1 < ratio.high
    (misled,) = estimate_arm_ratios(switch.blocks).values()
    assert misled.value > 1.2


@pytest.mark.parametrize(
    ("taken", "kept"), [(0.0, True), (0.05, True), (0.4, False), (None, False)]
)
def test_fewer_threads_are_learned_only_on_a_quiet_machine(taken: float | None, kept: bool) -> None:
    session = Beside({"threads": 1.3}, lambda arm: False, taken)
    arms = (BARE, {"threads": "one"})
    comparison = Comparison(arms, block_steps=4, discard_steps=1, rounds=8, decide="arms")
    session.compare_beside(comparison, Learner)
    (learned,) = [line for line in session.lines if isinstance(line, LearnedSettings)]
    assert [one.kept for one in learned.settings] == [kept]
    assert ("threads" in session.reasons("skipped")) != kept


@pytest.mark.parametrize("breaks_in_use", [False, True])
def test_a_setting_that_fails_does_not_take_its_knob_with_it(breaks_in_use: bool) -> None:
    session = Scripted({}, **{"breaking" if breaks_in_use else "failing": "a=fast"})
    arms = design.build_arms([[("a", "fast"), ("a", "safe")], [("b", "on")]])
    session.compare(Comparison(arms, block_steps=4, discard_steps=1, rounds=4, decide="settings"))
    assert session.reasons("failed").keys() == {"a=fast"}
    assert session.tried["a=fast"] == 1
    assert session.tried["a=safe"] > 1


def test_arms_take_turns_and_the_program_is_stopped_afterwards(tmp_path: Path) -> None:
    comparison = Comparison(
        arms=(BARE, BF16, FUSED), block_steps=5, discard_steps=2, warmup_steps=3, rounds=4
    )
    process = run(
        tmp_path,
        LOOP.replace(
            "    optimizer.zero_grad()",
            "    print(number, seen[-1], optimizer.param_groups[0]['fused'])\n"
            "    optimizer.zero_grad()",
        ),
        comparison,
    )
    assert process.end is not None
    assert process.end.reason == "stopped"
    assert len(process.steps) == comparison.longest_steps == 3 + 2 * 3 + 3 * 4 * 5
    assert [step.arm for step in process.steps[:9]] == [None] * 3 + [1] * 3 + [2] * 3
    assert [step.mark for step in process.steps[:9]] == [None] * 3 + ["first"] * 6
    blocks = [step.arm for step in process.steps[9::5]]
    assert blocks == list(block_order(3, 4))
    assert [step.mark for step in process.steps[9:]] == [*["switched"] * 2, *[None] * 3] * 12


def test_the_settings_of_an_arm_are_on_in_its_steps_only(tmp_path: Path) -> None:
    comparison = Comparison(
        arms=(BARE, BF16), block_steps=2, discard_steps=1, warmup_steps=2, first_steps=0, rounds=2
    )
    program = LOOP.replace(
        "    optimizer.step()",
        f"    open({str(tmp_path / 'seen')!r}, 'a').write(f'{{seen[-1]}}\\n')\n"
        "    optimizer.step()",
    )
    run(tmp_path, program, comparison)
    seen = (tmp_path / "seen").read_text().split()
    float32, bfloat16 = "float32", "bfloat16"
    assert [(dtype, len(list(same))) for dtype, same in groupby(seen)] == [
        (float32, 5),  # the first pass under precision is in float32
        (bfloat16, 3),
        (float32, 2),
    ]


def test_settings_change_between_micro_batches_and_the_training_stays_as_it_is(
    tmp_path: Path,
) -> None:
    comparison = Comparison(
        arms=(BARE, {"optimizer": "onepass"}, {"memory_format": "channels_last"}),
        block_steps=3,
        discard_steps=1,
        warmup_steps=2,
        rounds=6,
    )
    losses = []
    for name, compared in (("bare", Comparison((BARE,), rounds=30)), ("arms", comparison)):
        folder = tmp_path / name
        folder.mkdir()
        program = f"""
body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten())
net = nn.Sequential(body, nn.Linear(128, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
with open({str(folder / "losses")!r}, "w", buffering=1) as file:
    for number in range(90):
        loss = net(torch.randn(4, 3, 8, 8)).square().mean() / 5
        loss.backward()
        print(loss.item(), file=file)
        if number % 5 == 4:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
"""
        process = run(folder, program, compared)
        losses.append([float(line) for line in (folder / "losses").read_text().split()])
        assert process.micro_batches == 5
    assert len(losses[1]) > 60
    assert [e.why for e in process.events if e.what in ("failed", "skipped")] == []
    assert losses[1] == pytest.approx(losses[0][: len(losses[1])], rel=1e-4)


def test_evaluation_between_the_steps_does_not_count(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, FUSED), block_steps=4, first_steps=0, rounds=2)
    program = (
        LOOP
        + """
    if number % 3 == 0:
        net.eval()
        with torch.no_grad():
            net(x)
        net.train()
"""
    )
    process = run(tmp_path, program, comparison)
    assert len(process.steps) == 3 + 2 * 2 * 4
    assert process.evaluations


def test_an_arm_whose_loss_is_not_finite_is_out(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, BF16, FUSED), block_steps=4, rounds=4)
    program = LOOP.replace(
        "square().mean()",
        "square().mean() * (float('nan') if seen[-1] == 'bfloat16' else 1)",
    ).replace(
        "    optimizer.step()",
        "    if not loss.isfinite(): [p.grad.zero_() for p in net.parameters()]\n"
        "    optimizer.step()",
    )
    process = run(tmp_path, program, comparison)
    (failed,) = [event for event in process.events if event.what == "failed"]
    assert failed.subject == "arm 1"
    assert "not finite" in failed.why
    counts = {arm: sum(step.arm == arm for step in process.steps) for arm in (0, 1, 2)}
    assert counts == {0: 16, 1: 2, 2: 3 + 16}


def test_weights_spoilt_by_an_arm_end_the_comparison(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, BF16, FUSED), block_steps=4, rounds=4)
    program = LOOP.replace(
        "square().mean()",
        "square().mean() * (float('nan') if seen[-1] == 'bfloat16' else 1)",
    )
    process = run(tmp_path, program, comparison)
    assert any("non-finite weights" in event.why for event in process.events)
    assert len(process.steps) < 30


def test_a_setting_that_cannot_be_applied_is_out(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, {"no such knob": "on"}, FUSED), block_steps=3, rounds=2)
    process = run(tmp_path, LOOP, comparison)
    failed = [event for event in process.events if event.what == "failed"]
    assert [event.subject for event in failed] == ["arm 1"]
    assert failed[0].traceback is not None
    assert {step.arm for step in process.steps} == {None, 0, 2}


def test_a_baseline_with_non_finite_losses_disqualifies_nobody(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, BF16), block_steps=3, rounds=2)
    process = run(tmp_path, LOOP.replace("mean()", "mean() * float('inf')"), comparison)
    assert [event for event in process.events if event.what == "failed"] == []
    assert sum(step.arm == 1 for step in process.steps) == 3 + 6


def test_an_arm_that_is_refused_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    arms = (BARE, {"threads": "all"}, FUSED)  # OMP_NUM_THREADS is set
    process = run(tmp_path, LOOP, Comparison(arms=arms, block_steps=4, rounds=4))
    refused = [event for event in process.events if event.what == "skipped"]
    assert [(event.subject, event.why) for event in refused] == [
        ("arm 1", "the environment sets OMP_NUM_THREADS")
    ]
    assert {step.arm for step in process.steps} == {None, 0, 2}


def test_the_sizes_of_steps_are_noted_and_an_evaluation_is_not_added_to_them(
    tmp_path: Path,
) -> None:
    program = LOOP.replace("net(x)", "net(x[: 4 + number % 3])") + (
        "    if number % 4 == 0:\n"
        "        net.eval()\n"
        "        with torch.no_grad():\n"
        "            net(x)\n"
        "        net.train()\n"
    )
    process = run(tmp_path, program, Comparison(arms=(BARE, BF16), block_steps=3, rounds=4))
    sizes = [(step.rows, step.elements) for step in process.steps]
    expected = [(4 + number % 3, 8 * (4 + number % 3)) for number in range(len(sizes))]
    assert sizes == expected
