"""Comparisons inside one process: real programs, under the agent, with real knobs."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

from flatout.agent.switch import block_order
from flatout.record import ProcessRecord, read_run
from flatout.request import RUN_VARIABLE, Comparison, Request

BARE: dict[str, str] = {}
BF16 = {"precision": "bf16"}
FUSED = {"optimizer": "fused"}

PREAMBLE = """
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
x = torch.randn(16, 8)
seen = []
net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
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
    completed = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
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
    assert process.end["reason"] == "stopped"
    assert len(process.steps) == 3 + 3 * 4 * 5
    assert [step.arm for step in process.steps[:3]] == [None] * 3
    blocks = [step.arm for step in process.steps[3::5]]
    assert blocks == list(block_order(3, 4))
    assert [step.mark for step in process.steps[3:]] == [*["switched"] * 2, *[None] * 3] * 12


def test_the_settings_of_an_arm_are_on_in_its_steps_only(tmp_path: Path) -> None:
    comparison = Comparison(
        arms=(BARE, BF16), block_steps=2, discard_steps=1, warmup_steps=2, rounds=2
    )
    program = LOOP.replace(
        "    optimizer.step()",
        f"    open({str(tmp_path / 'seen')!r}, 'a').write(f'{{seen[-1]}}\\n')\n"
        "    optimizer.step()",
    )
    run(tmp_path, program, comparison)
    seen = (tmp_path / "seen").read_text().split()
    float32, bfloat16 = "torch.float32", "torch.bfloat16"
    assert [(dtype, len(list(same))) for dtype, same in groupby(seen)] == [
        (float32, 4),
        (bfloat16, 4),
        (float32, 2),
    ]


def test_evaluation_between_the_steps_does_not_count(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, FUSED), block_steps=4, rounds=2)
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
        "square().mean() * (float('nan') if seen[-1] == torch.bfloat16 else 1)",
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
    assert counts == {0: 16, 1: 1, 2: 16}


def test_weights_spoilt_by_an_arm_end_the_comparison(tmp_path: Path) -> None:
    comparison = Comparison(arms=(BARE, BF16, FUSED), block_steps=4, rounds=4)
    program = LOOP.replace(
        "square().mean()",
        "square().mean() * (float('nan') if seen[-1] == torch.bfloat16 else 1)",
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
    assert sum(step.arm == 1 for step in process.steps) == 6


def test_an_arm_that_is_refused_is_out_and_the_others_go_on(tmp_path: Path) -> None:
    arms = (BARE, {"threads": "all"}, FUSED)  # OMP_NUM_THREADS is set
    process = run(tmp_path, LOOP, Comparison(arms=arms, block_steps=4, rounds=4))
    failed = [event for event in process.events if event.what == "failed"]
    assert [(event.subject, event.why) for event in failed] == [
        ("arm 1", "OMP_NUM_THREADS is set: the number stays")
    ]
    assert {step.arm for step in process.steps} == {None, 0, 2}
