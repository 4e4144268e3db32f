"""A knob that raises in the middle of a run: turned back, recorded, and the run goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout.record import ProcessRecord, read_run
from flatout.request import RUN_VARIABLE, Comparison, Request

PROGRAM = """
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
x = torch.randn(512, 8)
for number in range(40):
    if number == BREAKS:
        {breakage}
    loss = net(x).square().mean()
    print(loss.item())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

BREAKAGES = {
    "random=paired": """
        from flatout.knobs.random import cpu
        cpu.Bernoulli.fill = cpu.Bernoulli.drop = None""",
    "optimizer=onepass": """
        from flatout.optim import functional
        functional._are_plain = None""",
    "optimizer=fused": """
        from flatout.knobs import optimizer as knob
        knob.refusal = None""",
    "precision=bf16": """
        torch.autocast = None""",
}


def run(
    tmp_path: Path, settings: str, breaks_at: int, comparison: Comparison | None = None
) -> tuple[list[float], ProcessRecord]:
    """The losses and the record of a program whose knob breaks at this step."""
    tmp_path.mkdir(exist_ok=True)
    name, _, setting = settings.partition("=")
    request = Request(
        settings={} if comparison is not None else {name: setting}, comparison=comparison
    )
    request.write(tmp_path)
    script = tmp_path / "program.py"
    program = PROGRAM.replace("{breakage}", BREAKAGES[settings]).replace("BREAKS", str(breaks_at))
    script.write_text(program)
    completed = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    process = read_run(tmp_path).main
    assert process is not None
    return [float(line) for line in completed.stdout.split()], process


def bare(tmp_path: Path) -> list[float]:
    script = tmp_path / "bare.py"
    script.write_text(PROGRAM.replace("{breakage}", "pass").replace("BREAKS", "-1"))
    return [
        float(line)
        for line in subprocess.run(
            [sys.executable, str(script)],
            env={k: v for k, v in os.environ.items() if k != RUN_VARIABLE}
            | {"FLATOUT_DISABLE": "1", RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.split()
    ]


@pytest.mark.parametrize("settings", BREAKAGES)
def test_a_knob_that_breaks_at_once_leaves_the_program_as_it_was(
    tmp_path: Path, settings: str
) -> None:
    losses, process = run(tmp_path / "run", settings, breaks_at=0)
    name = settings.partition("=")[0]
    events = [(e.what, e.why) for e in process.events if e.subject == name]
    assert [what for what, _ in events] == ["applied", "failed", "undone"]
    assert "'NoneType' object is not callable" in events[1][1]
    failed = next(e for e in process.events if e.what == "failed")
    assert failed.traceback is not None
    assert "Traceback" in failed.traceback
    assert len(process.steps) == 40
    assert losses == [step.losses[0] for step in process.steps]
    assert losses == bare(tmp_path)


@pytest.mark.parametrize("settings", BREAKAGES)
def test_a_knob_that_breaks_in_the_middle_is_turned_back(tmp_path: Path, settings: str) -> None:
    whole, _ = run(tmp_path / "whole", settings, breaks_at=-1)
    losses, process = run(tmp_path / "broken", settings, breaks_at=20)
    name = settings.partition("=")[0]
    assert [e.what for e in process.events if e.subject == name] == ["applied", "failed", "undone"]
    assert losses[:20] == whole[:20]
    assert losses == pytest.approx(whole, rel=0.5)
    assert len(process.steps) == 40


def test_an_arm_whose_knob_breaks_is_out(tmp_path: Path) -> None:
    comparison = Comparison(
        arms=({}, {"optimizer": "fused"}, {"precision": "bf16"}),
        block_steps=4,
        discard_steps=1,
        warmup_steps=2,
        first_steps=0,
        rounds=2,
    )
    _, process = run(tmp_path / "run", "optimizer=fused", breaks_at=7, comparison=comparison)
    (failed,) = [e for e in process.events if e.what == "failed" and e.subject == "arm 1"]
    assert failed.why.startswith("optimizer = fused: TypeError")
    arms = [step.arm for step in process.steps]
    assert arms.count(0) == 8
    assert arms.count(2) == 8
    assert arms.count(1) < 4
