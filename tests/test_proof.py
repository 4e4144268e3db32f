"""The proof on losses with a known difference, and on those of a real program that bf16 breaks."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flatout.record import Step
from flatout.request import Request
from flatout.tune import proof, trial
from flatout.tune.proof import Curve, Verdict
from flatout.turns import PHASES

SEEDS, STEPS = 4, 80


def bare_curve(seed: int, batch_noise: float = 0.1, seed_spread: float = 0.05) -> Curve:
    draw = random.Random(seed)
    offset = draw.gauss(0, seed_spread)
    return tuple(
        2 * math.exp(-number / 20) + 1 + offset + draw.gauss(0, batch_noise)
        for number in range(STEPS)
    )


def shifted(curve: Curve, change: Callable[[int], float]) -> Curve:
    return tuple(value + change(number) for number, value in enumerate(curve))


def judge(
    change: Callable[[int], float],
    *,
    self_seeded: bool = False,
    base: int = 0,
    bitwise: bool = False,
) -> Verdict:
    bare = [bare_curve(base if self_seeded else base + seed) for seed in range(SEEDS)]
    plan = [shifted(curve, change) for curve in bare]
    return proof.judge([(c,) for c in bare], [(c,) for c in plan], (bare[0],), bitwise)


def test_a_run_that_was_longer_repeats_another_as_far_as_that_goes() -> None:
    curve = bare_curve(0)
    for repeat in ((*curve, 1.0, 2.0), curve[:-3]):
        assert proof.judge([(curve,)] * 2, [(curve,)] * 2, (repeat,), True).bare_repeats
    assert not proof.judge([(curve,)] * 2, [(curve,)] * 2, ((9.0, *curve),), True).bare_repeats


@pytest.mark.parametrize("self_seeded", [False, True])
def test_identical_losses_are_bitwise(self_seeded: bool) -> None:
    verdict = judge(lambda number: 0.0, self_seeded=self_seeded, bitwise=True)
    assert verdict.passed
    assert verdict.kind == "bitwise"
    assert verdict.bare_repeats
    assert verdict.steps == STEPS
    (evidence,) = verdict.losses
    assert evidence.yardstick == ("batches" if self_seeded else "seeds")
    assert evidence.difference == 0.0
    assert evidence.margin > 0


@pytest.mark.parametrize("self_seeded", [False, True])
def test_rounding_passes(self_seeded: bool) -> None:
    draw = random.Random(1)
    verdict = judge(lambda number: draw.gauss(0, 1e-3), self_seeded=self_seeded)
    assert verdict.passed, verdict.why
    assert verdict.kind == "non-inferior"


def test_rounding_is_not_bitwise() -> None:
    verdict = judge(lambda number: 1e-7, bitwise=True)
    assert not verdict.passed
    assert "not identical" in verdict.why


def test_a_shift_of_two_deviations_between_seeds_is_refused() -> None:
    """In at least 90 % of the tries, whichever way it goes."""
    for sign in (1, -1):
        refused = [
            not judge(lambda number, s=sign: s * 0.1, base=100 * base).passed  # type: ignore[misc]
            for base in range(50)
        ]
        assert sum(refused) >= 45


def test_losses_that_diverge_late_are_refused() -> None:
    verdict = judge(lambda number: max(0.0, number - 60) * 0.02)
    assert not verdict.passed
    assert "loss" in verdict.why


def test_a_single_spike_is_refused_and_named() -> None:
    verdict = judge(lambda number: 5.0 if number == 13 else 0.0)
    assert not verdict.passed
    assert "stands out at step 13" in verdict.why


def test_non_finite_losses_are_refused_on_either_side() -> None:
    verdict = judge(lambda number: math.nan if number == 7 else 0.0)
    assert not verdict.passed
    assert "not finite at step 7 under the plan" in verdict.why
    broken = shifted(bare_curve(0), lambda number: math.inf if number == 3 else 0.0)
    verdict = proof.judge([(broken,)] * SEEDS, [(broken,)] * SEEDS, (broken,))
    assert not verdict.passed
    assert "not finite at step 3 under bare" in verdict.why


def test_each_loss_of_a_step_is_judged_on_its_own() -> None:
    bare = [(bare_curve(seed), bare_curve(seed + 50)) for seed in range(SEEDS)]
    plan = [(one, shifted(two, lambda number: 0.2)) for one, two in bare]
    verdict = proof.judge(bare, plan, bare[0])
    assert not verdict.passed
    assert verdict.why.startswith("loss 2 of 2")
    assert len(verdict.losses) == 2


def test_a_plan_that_changes_the_number_of_losses_is_refused() -> None:
    bare = [(bare_curve(seed), bare_curve(seed)) for seed in range(SEEDS)]
    verdict = proof.judge(bare, [(one,) for one, _ in bare], bare[0])
    assert not verdict.passed
    assert "number of backward calls" in verdict.why


def test_no_loss_no_proof() -> None:
    assert not proof.judge([()] * SEEDS, [()] * SEEDS, ()).passed


def test_a_program_that_does_not_repeat_itself_is_measured_by_batches() -> None:
    """Seeds then explain no more than repeating does."""
    draw = random.Random(5)
    one = bare_curve(0)
    bare = [shifted(one, lambda number: draw.gauss(0, 1e-3)) for _ in range(SEEDS)]
    plan = [shifted(curve, lambda number: draw.gauss(0, 1e-3)) for curve in bare]
    verdict = proof.judge([(c,) for c in bare], [(c,) for c in plan], (one,), bitwise=True)
    assert not verdict.bare_repeats
    assert verdict.losses[0].yardstick == "batches"
    assert "nor are those of two bare runs" in verdict.why


def step(*losses: float | None) -> Step:
    return Step(
        index=0,
        at_s=0.0,
        step_ms=1.0,
        phases_ms=dict.fromkeys(PHASES, 0.0),
        losses=losses,
        forwards=1,
        backwards=len(losses),
        updates=1,
        minor_faults=None,
        major_faults=None,
        peak_rss_bytes=None,
        peak_device_bytes=None,
        arm=None,
        mark=None,
        grad=True,
    )


def test_curves_leave_out_what_cannot_be_compared() -> None:
    steps = [step(1.0, None), step(2.0, 5.0), step(9.0), step(3.0, 6.0)]
    assert proof.curves(steps) == ((1.0, 2.0, 3.0),)
    many = [step(*[float(n + number) for n in range(16)]) for number in range(3)]
    assert proof.curves(many) == ((7.5, 8.5, 9.5),)
    assert proof.curves([]) == ()


SIGMOID_BEFORE_BCE_LOSS = """
import torch
from torch import nn
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1), nn.Sigmoid())
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for step in range(200):
    x = torch.randn(256, 16)
    y = (x[:, :1] > 0).float()
    wrong = torch.rand(256, 1) < 0.03
    loss = nn.functional.binary_cross_entropy(net(4 * x), torch.where(wrong, 1 - y, y))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_a_sigmoid_before_bce_loss_is_refused_in_bfloat16_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 the sigmoid rounds to exactly 1, and a wrong label costs 100."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    script = tmp_path / "program.py"
    script.write_text(SIGMOID_BEFORE_BCE_LOSS)

    def losses(settings: dict[str, str], seed: int) -> tuple[Curve, ...]:
        request = Request(settings=settings, stop_steps=60, seed=seed)
        done = trial.run([sys.executable, str(script)], request, isolate=False, timeout_seconds=100)
        assert trial.reasons(done.process, "failed") == {}
        return proof.curves(done.process.steps)

    seeds = (0, 1, 2)
    bare = [losses({}, seed) for seed in seeds]
    naive = proof.judge(bare, [losses({"precision": "bf16"}, seed) for seed in seeds], bare[0])
    assert not naive.passed
    assert "the loss stands out at step" in naive.why
    fused = proof.judge(bare, [losses({"optimizer": "fused"}, seed) for seed in seeds], bare[0])
    assert fused.passed, fused.why
