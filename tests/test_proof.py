"""The proof on runs with a known difference, and on those of real programs that a plan breaks."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import subprocess
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatout.knob import Exactness
from flatout.plan import Check
from flatout.tune import proof, trial
from flatout.tune.proof import Curve, Run, Verdict
from flatout.wire.lines import BufferState, Output, OutputTensor, RootState
from flatout.wire.record import Step, read_run
from flatout.wire.request import RUN_VARIABLE, Inspection, Request
from flatout.wire.turns import PHASES

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
    return judge_runs([(c,) for c in bare], [(c,) for c in plan], (bare[0],), bitwise)


def judge_runs(
    bare: Sequence[tuple[Curve, ...]],
    plan: Sequence[tuple[Curve, ...]],
    repeat: tuple[Curve, ...],
    bitwise: bool = False,
) -> Verdict:
    return proof.judge(
        [Run(curves) for curves in bare],
        [Run(curves) for curves in plan],
        [Run(repeat)],
        {"bitwise"} if bitwise else {"reduced"},
    )


def check(verdict: Verdict, name: str) -> Check:
    return next(check for check in verdict.checks if check.name == name)


def test_a_run_that_was_longer_repeats_another_as_far_as_that_goes() -> None:
    curve = bare_curve(0)
    for repeat in ((*curve, 1.0, 2.0), curve[:-3]):
        assert judge_runs([(curve,)] * 2, [(curve,)] * 2, (repeat,), True).bare_repeats
    assert not judge_runs([(curve,)] * 2, [(curve,)] * 2, ((9.0, *curve),), True).bare_repeats


@pytest.mark.parametrize("self_seeded", [False, True])
def test_identical_losses_are_bitwise(self_seeded: bool) -> None:
    verdict = judge(lambda number: 0.0, self_seeded=self_seeded, bitwise=True)
    assert verdict.passed
    assert verdict.kind == "bitwise"
    assert verdict.bare_repeats
    assert verdict.steps == STEPS
    (evidence,) = verdict.losses
    assert evidence.margin_source == ("batches" if self_seeded else "seeds")
    assert evidence.difference == 0.0
    assert evidence.margin > 0


@pytest.mark.parametrize("self_seeded", [False, True])
def test_rounding_passes_in_nearly_all_tries(self_seeded: bool) -> None:
    draw = random.Random(1)
    verdicts = [
        judge(lambda number: draw.gauss(0, 1e-3), self_seeded=self_seeded, base=100 * base)
        for base in range(40)
    ]
    assert sum(verdict.passed for verdict in verdicts) >= 38
    assert {verdict.kind for verdict in verdicts} == {"non-inferior"}


def test_rounding_is_not_bitwise() -> None:
    verdict = judge(lambda number: 1e-7, bitwise=True)
    assert not verdict.passed
    assert verdict.why == "the losses are not identical"


def redrawn(seed: int, shift: float) -> Curve:
    """A run of a plan that draws other random numbers: of the same kind, and shifted."""
    return shifted(bare_curve(10**6 + seed), lambda number: shift)


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("seeds", [4, 12])
def test_losses_two_deviations_higher_are_refused_and_lower_ones_are_not(
    draws: bool, seeds: int
) -> None:
    """In at least 90 % of the tries, also where the plan's runs are random draws of their own."""
    refused = {0.1: 0, -0.1: 0}
    for shift in refused:
        for base in range(0, 4000, 100):
            bare = [bare_curve(base + seed) for seed in range(seeds)]
            plan = [
                redrawn(base + seed, shift) if draws else shifted(bare[seed], lambda n: shift)  # noqa: B023
                for seed in range(seeds)
            ]
            verdict = judge_runs([(c,) for c in bare], [(c,) for c in plan], (bare[0],))
            refused[shift] += not verdict.passed and (shift > 0 or not verdict.undecided)
    assert refused[0.1] >= 36
    assert refused[-0.1] <= 2


def test_more_seeds_prove_a_plan_that_draws_other_random_numbers() -> None:
    def passed(seeds: int) -> list[Verdict]:
        runs = []
        for base in range(0, 4000, 100):
            bare = [(bare_curve(base + seed),) for seed in range(seeds)]
            plan = [(redrawn(base + seed, 0.0),) for seed in range(seeds)]
            runs.append(judge_runs(bare, plan, bare[0]))
        return runs

    few, many = passed(4), passed(12)
    assert sum(verdict.passed for verdict in many) >= 26
    assert sum(verdict.passed for verdict in few) < sum(verdict.passed for verdict in many)
    assert sum(verdict.passed or verdict.undecided for verdict in few) >= 34
    for verdict in few:
        assert not verdict.undecided or verdict.why.startswith("the loss may exceed bare's by up")


def diverging(curve: Curve, seed: int, begins: int, grows_to: float, shift: float = 0.0) -> Curve:
    """A run that follows another for some steps, and then goes its own way, as a GAN does."""
    draw = random.Random(seed)
    walk = 0.0
    values = []
    for number, value in enumerate(curve):
        if number >= begins:
            walk += draw.gauss(0, grows_to / math.sqrt(len(curve) - begins))
        values.append(value + walk + shift + draw.gauss(0, 1e-4))
    return tuple(values)


def test_first_steps_decide_if_later_ones_are_too_noisy() -> None:
    """With few pairs, each of which diverges, the mean of the last steps tells nothing."""
    decided = refused = 0
    for base in range(0, 2000, 100):
        bare = [bare_curve(base + seed) for seed in range(4)]
        plan = [diverging(curve, base + seed, 15, 0.15) for seed, curve in enumerate(bare)]
        verdict = judge_runs([(c,) for c in bare], [(c,) for c in plan], (bare[0],))
        decided += verdict.passed and "in the first" in check(verdict, "losses").why
        refused += not verdict.passed and not verdict.undecided
        worse = [diverging(curve, base + seed, 15, 0.15, 0.04) for seed, curve in enumerate(bare)]
        verdict = judge_runs([(c,) for c in bare], [(c,) for c in worse], (bare[0],))
        assert "in the first" not in check(verdict, "losses").why
    assert decided >= 3
    assert refused <= 8


def test_first_steps_do_not_excuse_later_ones() -> None:
    for base in range(0, 2000, 100):
        bare = [bare_curve(base + seed) for seed in range(4)]
        plan = [
            shifted(diverging(curve, base + seed, 15, 0.1), lambda n: 0.4 if n > 30 else 0.0)
            for seed, curve in enumerate(bare)
        ]
        assert not judge_runs([(c,) for c in bare], [(c,) for c in plan], (bare[0],)).passed


def test_a_loss_that_is_far_too_low_is_refused() -> None:
    verdict = judge(lambda number: -0.8)
    assert not verdict.passed
    assert "the plan appears to be training something else" in verdict.why
    assert not verdict.undecided


@pytest.mark.parametrize("steps_from_the_end", [5, 20])
def test_losses_that_diverge_late_are_refused(steps_from_the_end: int) -> None:
    """A run of 200 steps that diverges after 150 does so in its last quarter."""
    start = STEPS - steps_from_the_end
    verdict = judge(lambda number: 2 * max(0.0, number - start) / steps_from_the_end)
    assert not verdict.passed
    assert "loss" in verdict.why


def test_a_single_spike_is_refused_and_named() -> None:
    verdict = judge(lambda number: 5.0 if number == 13 else 0.0)
    assert not verdict.passed
    assert "stands out at step 13" in verdict.why
    assert check(verdict, "spikes").result == "failed"
    assert judge(lambda number: -0.5 if number == 13 else 0.0).passed


def test_a_spike_that_bare_has_as_well_is_none() -> None:
    bare = [bare_curve(seed) for seed in range(SEEDS)]
    bare[1] = shifted(bare[1], lambda number: 5.0 if number == 50 else 0.0)
    assert judge_runs([(c,) for c in bare], [(c,) for c in bare], (bare[0],)).passed


def test_non_finite_losses_are_refused_on_either_side() -> None:
    verdict = judge(lambda number: math.nan if number == 7 else 0.0)
    assert not verdict.passed
    assert "not finite at step 7 under the plan" in verdict.why
    broken = shifted(bare_curve(0), lambda number: math.inf if number == 3 else 0.0)
    verdict = judge_runs([(broken,)] * SEEDS, [(broken,)] * SEEDS, (broken,))
    assert not verdict.passed
    assert "not finite at step 3 under bare" in verdict.why


def test_each_loss_of_a_step_is_judged_on_its_own() -> None:
    bare = [(bare_curve(seed), bare_curve(seed + 50)) for seed in range(SEEDS)]
    plan = [(one, shifted(two, lambda number: 0.2)) for one, two in bare]
    verdict = judge_runs(bare, plan, bare[0])
    assert not verdict.passed
    assert verdict.why.startswith("loss 2 of 2")
    assert len(verdict.losses) == len(verdict.curves) == 2


def test_both_curves_are_in_the_verdict() -> None:
    verdict = judge(lambda number: 0.01)
    (curves,) = verdict.curves
    assert curves.steps == tuple(range(STEPS))
    assert curves.bare[3] == pytest.approx(sum(bare_curve(s)[3] for s in range(SEEDS)) / SEEDS)
    assert curves.plan[3] == pytest.approx(curves.bare[3] + 0.01)
    (evidence,) = verdict.losses
    assert len(evidence.bare_curve) == len(evidence.plan_curve) == 20
    assert evidence.bare_curve[0] == pytest.approx(sum(curves.bare[:4]) / 4)


def test_a_plan_that_changes_the_number_of_losses_is_refused() -> None:
    bare = [(bare_curve(seed), bare_curve(seed)) for seed in range(SEEDS)]
    verdict = judge_runs(bare, [(one,) for one, _ in bare], bare[0])
    assert not verdict.passed
    assert "number of backward calls" in verdict.why


def test_no_loss_no_proof() -> None:
    assert not judge_runs([()] * SEEDS, [()] * SEEDS, ()).passed


def test_a_program_that_does_not_repeat_itself_is_measured_by_batches() -> None:
    """Seeds then explain no more than repeating does, and nothing can be shown to be identical."""
    draw = random.Random(5)
    one = bare_curve(0)
    bare = [shifted(one, lambda number: draw.gauss(0, 1e-3)) for _ in range(SEEDS)]
    plan = [shifted(curve, lambda number: draw.gauss(0, 1e-3)) for curve in bare]
    verdict = judge_runs([(c,) for c in bare], [(c,) for c in plan], (one,), bitwise=True)
    assert not verdict.bare_repeats
    assert verdict.losses[0].margin_source == "batches"
    assert check(verdict, "identity").result == "open"
    assert "cannot be proven" in check(verdict, "identity").why
    assert verdict.passed, "the other checks are all there is"


# The end, passes that do not train, outputs


def ended(digest: str, mean: float, non_finite: int = 0) -> Run:
    buffers = (BufferState("norm.running_mean", mean, abs(mean)),)
    state = (RootState("Net", digest, non_finite, buffers),)
    return Run((bare_curve(0),), steps=STEPS, state=state)


def test_probabilities_that_become_exactly_1_are_told_from_those_that_are(tmp_path: Path) -> None:
    def judged(bare_ones: int, plan_ones: int, seen: int = 1000) -> proof.Verdict:
        bare, plan = (
            Run((bare_curve(0),), steps=STEPS, state=(RootState("D", "", 0, (), seen, ones),))
            for ones in (bare_ones, plan_ones)
        )
        return proof.judge([bare] * 2, [plan] * 2, [bare], {"reduced"})

    assert check(judged(0, 0), "probabilities").result == "passed"
    assert check(judged(300, 301), "probabilities").result == "passed"
    refused = judged(1, 12)
    assert not refused.passed
    assert "1.20% of the probabilities that the model returns are exactly 1" in refused.why
    assert all(c.name != "probabilities" for c in judged(0, 0, seen=0).checks)


def test_weights_must_be_identical_to_the_bit_where_losses_are() -> None:
    bare = [ended("a", 1.0)] * 2
    assert proof.judge(bare, bare, [bare[0]], {"bitwise"}).kind == "bitwise"
    verdict = proof.judge(bare, [ended("b", 1.0)] * 2, [bare[0]], {"bitwise"})
    assert not verdict.passed
    assert verdict.why == "the weights are not identical"
    unrepeatable = proof.judge(bare, [ended("b", 1.0)] * 2, [ended("c", 1.0)], {"bitwise"})
    assert unrepeatable.passed
    assert not unrepeatable.bare_repeats
    assert check(unrepeatable, "identity").result == "open"


def with_state(means: Sequence[float], non_finite: int = 0) -> list[Run]:
    return [
        dataclasses.replace(ended(str(seed), mean, non_finite), curves=(bare_curve(seed),))
        for seed, mean in enumerate(means)
    ]


def test_buffers_may_move_by_as_much_as_between_seeds() -> None:
    bare = with_state([1.0, 1.1, 0.9, 1.05])
    for plan, result in (
        (with_state([1.01, 1.12, 0.9, 1.05]), "passed"),
        (with_state([1.2, 1.3, 1.1, 1.25]), "failed"),
        (with_state([1.0, 1.1, 0.9, 1.05], non_finite=3), "failed"),
        (with_state([1.0, 1.1, 0.9, math.nan]), "failed"),
    ):
        verdict = proof.judge(bare, plan, [bare[0]], {"reduced"})
        assert check(verdict, "state").result == result
        assert verdict.passed == (result == "passed")


def output(values: Sequence[float], inputs: str = "same", shape: tuple[int, ...] = ()) -> Output:
    rms = math.sqrt(sum(value**2 for value in values) / len(values))
    rows = [values[n : n + 3] for n in range(0, len(values), 3)] if shape else []
    tensor = OutputTensor(
        shape=shape,
        mean=sum(values) / len(values),
        rms=rms,
        sample=array("f", values),
        top1=array("i", [row.index(max(row)) for row in rows]) if rows else None,
        lead=array("f", [max(row) - sorted(row)[1] for row in rows]) if rows else None,
    )
    return Output("Net", inputs, repr(values), (tensor,))


def test_losses_of_evaluation_passes_are_held_to_the_same_margin() -> None:
    def runs(shift: float) -> list[Run]:
        return [
            Run(
                (bare_curve(seed),),
                outputs=[output([2.0 + 0.1 * seed + shift - 0.01 * n]) for n in range(8)],
            )
            for seed in range(SEEDS)
        ]

    for shift, passed in ((0.0, True), (0.01, True), (-0.1, True), (0.3, False)):
        verdict = proof.judge(runs(0.0), runs(shift), [], {"reduced"})
        assert verdict.passed == passed, shift
    assert verdict.why.startswith("output 0 of Net exceeds bare's by 0.3")


@pytest.mark.parametrize("values", [1, 4])
@pytest.mark.parametrize("noise", [0.0, 1e-8])
@pytest.mark.parametrize(
    ("change", "exactness", "passed"),
    [
        (0.02, {"reduced"}, True),
        (0.1, {"reduced"}, False),
        (5e-4, {"reordered", "bitwise"}, True),
        (0.02, {"reordered"}, False),
        (5e-4, {"bitwise"}, False),
    ],
)
def test_an_evaluation_that_no_seed_changes_may_have_the_error_of_an_output(
    values: int, noise: float, change: float, exactness: set[Exactness], passed: bool
) -> None:
    """A pretrained model is evaluated before its first update; bare may repeat itself or not."""
    bare, plan = (
        [
            Run((bare_curve(seed),), outputs=[output([loss * (1 + seed * noise)])] * values)
            for seed in range(SEEDS)
        ]
        for loss in (2.0, 2.0 * (1 + change))
    )
    verdict = proof.judge(bare, plan, [bare[0]], exactness)
    evaluation = check(verdict, "evaluation")
    assert (evaluation.result == "passed") == passed, evaluation.why
    assert ("rounding error" in evaluation.why) == (exactness != {"bitwise"})


@pytest.mark.parametrize(
    ("of_bare", "of_plan", "passed"),
    [
        ([math.inf, 2.0], [math.inf, 2.0], True),
        ([math.nan, 2.0], [3.0, 2.0], True),
        ([math.inf, math.nan], [1.0, 2.0], True),
        ([1.0, 2.0], [1.0, math.nan], False),
    ],
)
def test_an_evaluation_that_is_not_finite_in_bare_is_not_held_against_the_plan(
    of_bare: list[float], of_plan: list[float], passed: bool
) -> None:
    bare, plan = (
        [
            Run((bare_curve(seed),), outputs=[output([loss]) for loss in losses])
            for seed in range(SEEDS)
        ]
        for losses in (of_bare, of_plan)
    )
    verdict = proof.judge(bare, plan, [], {"reordered"})
    assert all(c.result != "failed" for c in verdict.checks if c.name == "evaluation") == passed


LOGITS = [0.1, 2.0, -1.0, 0.3, 0.1, 3.0, 1.5, -0.4, 0.2]


def infer(
    outputs: Sequence[Output], exactness: set[str], bare: Sequence[Output] | None = None
) -> Verdict:
    def runs(calls: Sequence[Output]) -> list[Run]:
        return [Run((), len(calls), trains=False, outputs=calls)] * 2

    ours = runs([output(LOGITS, shape=(3, 3))] * 3 if bare is None else bare)
    return proof.judge(ours, runs(outputs), [ours[0]], exactness)  # type: ignore[arg-type]


def test_outputs_of_inference_on_identical_inputs() -> None:
    near = output([value * 1.01 for value in LOGITS], shape=(3, 3))
    verdict = infer([near] * 3, {"reduced"})
    assert verdict.passed
    assert verdict.kind == "non-inferior"
    assert verdict.steps == 6
    figures = check(verdict, "outputs").measurements
    assert figures["relative_error"] == pytest.approx(0.01, rel=1e-3)
    assert figures["top1_agreement"] == 1.0
    assert "100.00% of 18 rows" in verdict.why
    assert not infer([near] * 3, {"reordered"}).passed

    exact = infer([output(LOGITS, shape=(3, 3))] * 3, {"bitwise"})
    assert (exact.passed, exact.kind) == (True, "bitwise")
    rounded = infer([output([v + 1e-7 for v in LOGITS], shape=(3, 3))] * 3, {"bitwise"})
    assert rounded.why == "the outputs are not identical"

    wrong = output([*LOGITS[:6], 0.2, -0.4, 1.5], shape=(3, 3))
    assert not infer([wrong] * 3, {"reduced"}).passed


def test_a_first_choice_is_held_against_the_plan_only_where_it_is_clear() -> None:
    row = [5.0, 4.9, 0.0]
    for lead, passed in ((0.001, True), (1.0, False)):
        one = output(row * 100, shape=(100, 3))
        (tensor,) = one.tensors
        clear = dataclasses.replace(tensor, lead=array("f", [lead] * 100))
        bare = [dataclasses.replace(one, tensors=(clear,))]
        verdict = infer([output([4.95, 4.96, 0.0] * 100, shape=(100, 3))], {"reduced"}, bare)
        assert check(verdict, "outputs").measurements["top1_agreement"] == 0.0
        assert verdict.passed == passed


def test_whether_outputs_repeat_is_not_known_of_a_run_without_any() -> None:
    runs = [Run((), 3, trains=False, outputs=[output(LOGITS, shape=(3, 3))] * 3)] * 2
    unseen = Run((), 3, trains=False)
    assert proof.judge(runs, runs, [unseen], {"reduced"}).bare_repeats is None
    assert proof.judge(runs, runs, [runs[0]], {"reduced"}).bare_repeats is True


def test_outputs_for_other_inputs_prove_nothing() -> None:
    verdict = infer([output(LOGITS, inputs="others", shape=(3, 3))] * 3, {"reduced"})
    assert not verdict.passed
    assert "identical inputs" in verdict.why


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
    assert proof.extract_curves(steps) == ((1.0, 2.0, 3.0),)
    many = [step(*[float(n + number) for n in range(16)]) for number in range(3)]
    assert proof.extract_curves(many) == ((7.5, 8.5, 9.5),)
    assert proof.extract_curves([]) == ()


SIGMOID_BEFORE_BCE_LOSS = """
import torch
from flatout.agent import activate
activate()
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


TRAPS = """
import sys
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.set_num_threads(1)

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.view_as(weight)
    @staticmethod
    def backward(ctx, grad):
        return 1.25 * grad

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 32)
        self.head = nn.Linear(32, 1)
        self.calls = 0
    def forward(self, x):
        self.calls += 1
        trap = sys.argv[1] if torch.is_autocast_enabled("cpu") else "none"
        weight = self.second.weight
        if trap == "factor":
            weight = Wrong.apply(weight)
        y = torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), weight, self.second.bias))
        if trap == "late" and self.calls > 150:
            y = y * (1 + (-1) ** self.calls * (self.calls - 150) / 10)
        return self.head(y)

net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for step in range(400):
    x = torch.randn(64, 16)
    y = x[:, :1] * x[:, 1:2] + 0.1 * torch.randn(64, 1)
    loss = nn.functional.mse_loss(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def seen(script: Path, plan: dict[str, str], seed: int, steps: int, trap: str) -> Run:
    folder = script.parent / f"{trap}-{'-'.join(plan.values())}-{seed}"
    folder.mkdir()
    inspection = Inspection(gradient_steps=3, state=True)
    request = Request(settings=plan, stop_steps=steps, seed=seed, inspection=inspection)
    request.write(folder)
    completed = subprocess.run(
        [sys.executable, str(script), trap],
        env={**os.environ, RUN_VARIABLE: str(folder)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (completed.returncode, completed.stderr) == (0, "")
    process = read_run(folder).main
    assert process is not None
    assert trial.collect_reasons(process, "failed") == {}
    return Run.of(process)


def all_runs(
    script: Path, plans: Sequence[tuple[dict[str, str], str]], seeds: int, steps: int
) -> list[list[Run]]:
    """Runs of each plan with its trap, from each seed, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            [pool.submit(seen, script, plan, seed, steps, trap) for seed in range(seeds)]
            for plan, trap in plans
        ]
        return [[job.result() for job in runs] for runs in jobs]


BF16, FUSED = {"precision": "bf16"}, {"optimizer": "fused"}


def test_a_sigmoid_before_bce_loss_is_refused_in_bfloat16_only(tmp_path: Path) -> None:
    """In bfloat16 the sigmoid rounds to exactly 1, and a wrong label costs 100."""
    script = tmp_path / "program.py"
    script.write_text(SIGMOID_BEFORE_BCE_LOSS)
    bare, naive, fused = all_runs(script, [({}, ""), (BF16, ""), (FUSED, "")], 2, 60)
    verdict = proof.judge(bare, naive, [bare[0]], proof.collect_exactness(BF16))
    assert not verdict.passed
    assert "the loss stands out at step" in verdict.why
    assert check(verdict, "probabilities").result == "failed"
    assert "that the model returns are exactly 1, 0.0" in check(verdict, "probabilities").why
    verdict = proof.judge(bare, fused, [bare[0]], proof.collect_exactness(FUSED))
    assert verdict.passed, verdict.why
    assert check(verdict, "gradients").measurements["error"] < 1e-5
    assert check(verdict, "state").result == "passed"
    assert check(verdict, "probabilities").result == "passed"


@pytest.mark.long
def test_traps_that_spring_under_a_plan_are_caught(tmp_path: Path) -> None:
    """One gradient wrong by a constant factor, and a divergence after 150 steps."""
    script = tmp_path / "program.py"
    script.write_text(TRAPS)
    plans = [({}, "none"), (BF16, "none"), (BF16, "factor"), (BF16, "late")]
    bare, honest, factor, late = all_runs(script, plans, 2, 200)
    exactness = proof.collect_exactness(BF16)

    verdict = proof.judge(bare, honest, [bare[0]], exactness)
    assert verdict.passed, verdict.why
    assert {check.name for check in verdict.checks} == {"losses", "spikes", "gradients", "state"}

    verdict = proof.judge(bare, factor, [bare[0]], exactness)
    assert not verdict.passed
    found = check(verdict, "gradients")
    assert found.why.startswith("the gradient norm of Net.second.weight is 1.25 times bare's")
    assert abs(check(verdict, "losses").measurements["difference"]) < 0.02, (
        "Adam hides it from the loss"
    )

    verdict = proof.judge(bare, late, [bare[0]], exactness)
    assert not verdict.passed
    assert verdict.steps == 200
    assert "the loss" in verdict.why
    until_then = [Run(tuple(curve[:150] for curve in run.curves)) for run in late]
    assert proof.judge(bare, until_then, [bare[0]], exactness).passed


def hogwild(run: int, spike: float = 0.0, start: int | None = None) -> Curve:
    """Losses of one of several processes that train one set of weights: how far the others have
    come when it begins is another in every run."""
    draw = random.Random(run)
    begun = draw.randrange(0, 30) if start is None else start
    curve = [
        0.2 + 2.1 * math.exp(-(number + begun) / 12) + draw.gauss(0, 0.03)
        for number in range(STEPS)
    ]
    curve[50] += spike
    return tuple(curve)


def test_a_loss_stands_out_only_beyond_what_bare_is_above_itself_from_run_to_run() -> None:
    """Where one repeat of bare differs from it, a step has no counterpart in another run."""
    alarms = 0
    for base in range(0, 400, 10):
        bare = [(hogwild(base + run),) for run in range(4)]
        plan = [(hogwild(5000 + base + run),) for run in range(4)]
        verdict = judge_runs(bare, plan, (hogwild(base + 9),))
        assert not verdict.bare_repeats
        assert check(verdict, "spikes").result == "passed", check(verdict, "spikes").why
        alarms += not (verdict.passed or verdict.undecided)
    assert alarms <= 2
    bare = [(hogwild(run),) for run in range(4)]
    for spike, result in ((2.0, "failed"), (0.1, "passed")):
        plan = [*bare[:3], (hogwild(77, spike),)]
        assert check(judge_runs(bare, plan, (hogwild(9),)), "spikes").result == result
    # the same start of a run stands out where bare repeats itself
    late = [(hogwild(run, start=29),) for run in range(4)]
    plan = [*late[:3], (hogwild(3, start=0),)]
    assert check(judge_runs(late, plan, late[0]), "spikes").result == "failed"


@pytest.mark.parametrize("length", [STEPS // 4, STEPS - 5])
def test_a_differing_repeat_that_was_shorter_does_not_count_for_the_margin(length: int) -> None:
    bare = [(hogwild(run),) for run in range(4)]
    plan = [(hogwild(100 + run),) for run in range(4)]
    short = hogwild(9)[:length]
    repeats = [Run((curve,)) for curve in (short, tuple(value + 5 for value in bare[0][0]))]
    alone = proof.judge([Run(c) for c in bare], [Run(c) for c in plan], repeats[1:], {"reduced"})
    verdict = proof.judge([Run(c) for c in bare], [Run(c) for c in plan], repeats, {"reduced"})
    assert verdict.losses[0].margin_source == alone.losses[0].margin_source == "runs"
    assert verdict.losses[0].margin == alone.losses[0].margin


def plateau(seed: int, slope: float = 0.0) -> Curve:
    draw = random.Random(seed)
    return tuple(2.3 - slope * number / STEPS + draw.gauss(0, 0.1) for number in range(STEPS))


def test_a_loss_that_has_not_fallen_proves_little_and_the_result_says_so() -> None:
    draw = random.Random(0)

    def judged(*slopes: float, bitwise: bool = False) -> Verdict:
        bare = [tuple(plateau(seed, s) for s in slopes) for seed in range(SEEDS)]
        noise = 0.0 if bitwise else 1e-3
        plan = [tuple(shifted(c, lambda n: draw.gauss(0, noise)) for c in run) for run in bare]
        return judge_runs(bare, plan, bare[0], bitwise)

    flat = judged(0.0)
    assert flat.passed, "it is no reason against a plan"
    assert flat.kind == "inconclusive"
    assert check(flat, "losses").result == "open"
    assert "the loss did not fall within 80 steps (from 2.3" in flat.why
    assert judged(1.0).kind == "non-inferior"
    assert judged(0.0, 1.0).kind == "non-inferior", "one of two losses has fallen"
    assert judged(0.0, bitwise=True).kind == "bitwise", "identical is identical"
    rising = judged(-1.0)
    assert rising.kind == "inconclusive"
    # under a plan that learns nothing, a loss that had fallen would have been refused
    bare = [(plateau(seed, 1.0),) for seed in range(SEEDS)]
    stuck = [(plateau(100 + seed),) for seed in range(SEEDS)]
    assert not judge_runs(bare, stuck, bare[0]).passed


def test_one_identical_repeat_of_several_is_not_a_program_that_repeats_itself() -> None:
    bare = [ended("a", 1.0)] * 2
    plan = [ended("b", 1.0)] * 2
    assert not proof.judge(bare, plan, [bare[0]], {"bitwise"}).passed
    verdict = proof.judge(bare, plan, [bare[0], bare[0], ended("c", 1.0)], {"bitwise"})
    assert verdict.passed
    assert check(verdict, "identity").result == "open"
