"""A knob that raises in the middle of a run: withdrawn, recorded, and the run goes on."""

from __future__ import annotations

import os
import sys
import textwrap
from pathlib import Path

import forking
import pytest

from flatout.wire.record import ProcessRecord, read_run
from flatout.wire.request import RUN_VARIABLE, Comparison, Request

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
        from flatout.optim import prepared
        prepared._is_plain = None""",
    "optimizer=fused": """
        from flatout.optim import functional
        functional.Fused.step = None""",
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
    completed = forking.run(
        [sys.executable, script],
        env={**os.environ, RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr == ""
    process = read_run(tmp_path).main
    assert process is not None
    return [float(line) for line in completed.stdout.split()], process


def bare(tmp_path: Path) -> list[float]:
    script = tmp_path / "bare.py"
    script.write_text(PROGRAM.replace("{breakage}", "pass").replace("BREAKS", "-1"))
    environment = {"FLATOUT_DISABLE": "1", RUN_VARIABLE: str(tmp_path), "OMP_NUM_THREADS": "1"}
    completed = forking.run([sys.executable, script], env={**os.environ, **environment})
    assert completed.returncode == 0, completed.stderr
    return [float(line) for line in completed.stdout.split()]


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
def test_a_knob_that_breaks_in_the_middle_is_withdrawn(tmp_path: Path, settings: str) -> None:
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


@pytest.mark.parametrize("settings", ["precision=bf16", "memory_format=channels_last"])
def test_an_error_of_a_signal_handler_in_a_forward_pass_is_the_programs(
    tmp_path: Path, settings: str
) -> None:
    program = """
    import functools, signal
    from flatout.agent import activate
    activate()
    import torch
    from torch import nn

    class OutOfTime(Exception):
        pass

    class Deadline:
        def pass_by(self, number, frame):
            raise OutOfTime

        def __call__(self, number, frame):
            raise OutOfTime

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            output = self.convolution(x)
            if alarms and len(seen) % 2:
                signal.signal(signal.SIGUSR1, alarms.pop())
                signal.raise_signal(signal.SIGUSR1)
            return output

    def pass_by(number, frame):
        raise OutOfTime

    alarms = [
        pass_by,
        Deadline().pass_by,
        Deadline(),
        functools.partial(lambda why, number, frame: pass_by(number, frame), "why"),
    ]
    seen = []
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(12):
        try:
            net(torch.ones(2, 3, 8, 8)).sum().backward()
        except OutOfTime:
            seen.append("out of time")
        else:
            seen.append("done")
        optimizer.step()
        optimizer.zero_grad()
    print(seen.count("out of time"))
    """
    name, _, setting = settings.partition("=")
    Request(settings={name: setting}).write(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(program))
    completed = forking.run(
        [sys.executable, script], env={**os.environ, RUN_VARIABLE: str(tmp_path)}
    )
    assert (completed.returncode, completed.stdout) == (0, "4\n"), completed.stderr
    process = read_run(tmp_path).main
    assert process is not None
    assert [e.what for e in process.events if e.subject == name] == ["applied"]
