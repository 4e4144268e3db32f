"""``flatout tune`` on real programs: what it finds, what it refuses, and what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout import plan
from flatout.cli import main
from flatout.tune import tuner
from flatout.tune.tuner import Options, Outcome, Tuner

SLOW_BF16 = {"bfloat16": 1e10, "float32": 1e11}
"""A machine on which precision is not tried."""

MANY_TENSORS = """
import sys
import torch
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    \"\"\"Many small tensors, so that the optimizer takes most of the step.\"\"\"
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(0.1 * torch.randn(16)) for _ in range(400))
    def forward(self, x):
        w = torch.stack(list(self.parts)).sum(0)
        z = torch.nn.functional.linear(x, w[None])
        if not torch.is_autocast_enabled("cpu"):
            BEFORE
        return torch.sigmoid(z)

net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(STEPS):
    x = 4 * torch.randn(256, 16)
    y = (x[:, :1] > 0).float()
    y = torch.where(torch.rand(256, 1) < 0.03, 1 - y, y)
    loss = nn.functional.binary_cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def write(tmp_path: Path, program: str, before: str = "pass", steps: int = 1000) -> list[str]:
    script = tmp_path / "program.py"
    script.write_text(program.replace("BEFORE", before).replace("STEPS", str(steps)))
    return [sys.executable, str(script)]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("FLATOUT_HOME", str(path))
    return path


@pytest.fixture
def two_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer runs than a claim needs, enough for what these tests look at."""
    monkeypatch.setattr(tuner, "MINIMUM_PAIRS", 2)
    monkeypatch.setattr(tuner, "MAXIMUM_PAIRS", 2)


def tune(command: list[str], rates: dict[str, float], steps: int) -> Outcome:
    options = Options(
        budget_seconds=90, steps=steps, isolate=False, knobs=("precision", "optimizer")
    )
    return Tuner(command, options, lambda line: None, lambda python, device: rates).run()


@pytest.mark.usefixtures("two_pairs")
def test_a_faster_and_wrong_setting_is_turned_back_and_the_rest_tried(tmp_path: Path) -> None:
    """Autocast spares the program work, so it wins, and breaks a sigmoid before BCE loss."""
    work = "for _ in range(8): torch.ones(400, 400) @ torch.ones(400, 400)"
    outcome = tune(write(tmp_path, MANY_TENSORS, work), {}, steps=40)
    assert set(outcome.in_process) == {"precision", "optimizer"}
    assert outcome.dropped["precision"].startswith("not proven: the loss")
    assert "not proven" not in outcome.dropped.get("optimizer", "")
    assert set(outcome.settings) <= {"optimizer"}
    if outcome.evidence is None:
        assert "no gain beyond noise" in outcome.why
    else:
        assert outcome.evidence.ratio_low > 1
        assert outcome.evidence.losses[0].yardstick == "seeds"


def test_nothing_to_try_is_a_result(tmp_path: Path) -> None:
    program = """
import torch
w = torch.zeros(4, requires_grad=True)
net = torch.nn.Linear(4, 1)
for step in range(1000):
    loss = (net(torch.randn(8, 4)) ** 2).mean()
    loss.backward()
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p.grad
            p.grad = None
"""
    outcome = tune(write(tmp_path, program), SLOW_BF16, steps=20)
    assert outcome.settings == {}
    assert outcome.evidence is None
    assert outcome.why.startswith("no setting is faster")
    assert "no optimizer object" in outcome.dropped["optimizer"]
    assert "10 GFLOP/s" in outcome.dropped["precision"]


def groups(available: int | None, count: int) -> list[dict[str, str]]:
    made = Tuner(["x"], Options(), lambda line: None, lambda python, device: {})
    made._available = available
    return made._groups({str(number): "on" for number in range(count)})


def test_a_short_program_compares_the_knobs_in_parts() -> None:
    assert [len(group) for group in groups(None, 5)] == [5]
    assert [len(group) for group in groups(None, 9)] == [5, 4]
    assert [len(group) for group in groups(80, 5)] == [2, 2, 1]  # three arms of six blocks of four
    assert [len(group) for group in groups(30, 2)] == [1, 1]
    assert groups(None, 0) == []
    parts = groups(80, 5)
    assert sorted(name for group in parts for name in group) == list("01234")


@pytest.mark.usefixtures("two_pairs")
def test_an_arm_that_ends_a_short_program_is_dropped_with_its_reason(tmp_path: Path) -> None:
    command = write(tmp_path, MANY_TENSORS, "return torch.sigmoid(z)\n        sys.exit(3)", 80)
    outcome = tune(command, {}, steps=80)
    assert "exit code 3" in outcome.dropped["precision"]
    assert set(outcome.in_process) == {"optimizer"}


def flatout(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatout", "tune", "--in-place", *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


MISTAKES = {
    "only infers": (
        "import torch\nnet = torch.nn.Linear(4, 1)\n"
        "with torch.no_grad():\n    for _ in range(50): net(torch.randn(2, 4))",
        "only runs inference",
    ),
    "no step": ("import torch", "never calls a model"),
    "no torch": ("print('hello')", "imported torch"),
    "crashes": (
        "import torch\nprint('loading')\nraise KeyError('my data')",
        "failed with exit code 1; its last lines:",
    ),
    "too short": (
        MANY_TENSORS.replace("BEFORE", "pass").replace("STEPS", "7"),
        "ends after 7 training steps, tune needs at least 20",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_programs_that_cannot_be_tuned_are_one_sentence(tmp_path: Path, mistake: str) -> None:
    program, message = MISTAKES[mistake]
    command = write(tmp_path, program)
    completed = flatout("--quiet", "--", *command, folder=tmp_path)
    assert completed.returncode == 2
    assert completed.stdout == ""
    assert completed.stderr.startswith("flatout: ")
    assert message in completed.stderr
    assert "flatout/" not in completed.stderr  # no traceback of ours
    assert ("KeyError: 'my data'" in completed.stderr) == (mistake == "crashes")
    assert not (tmp_path / "flatout.toml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "soon", "--", "x"], "is not a time such as"),
        (["--steps", "0", "--", "x"], "is not a positive integer"),
        (["--steps", "5", "--", "x"], "must be at least 20"),
        (["--knobs", "gc,warp", "--", "x"], "there is no knob 'warp' (known: "),
        (["--plan", "nowhere/p.toml", "--", "x"], "there is no folder nowhere"),
        (["--in-place", "--", "no-such-program-anywhere"], "no-such-program-anywhere"),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["tune", *words])
    except SystemExit as exit_:  # argparse
        code = int(exit_.code or 0)
    assert code != 0
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("two_pairs")
def test_plan_report_and_document_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = write(tmp_path, MANY_TENSORS)
    monkeypatch.chdir(tmp_path)
    options = ["--in-place", "--budget", "20s", "--steps", "30", "--json", "found.json"]
    options += ["--knobs", "precision,optimizer"]
    assert main(["tune", *options, "--", *command]) == 0
    said = capsys.readouterr()
    assert said.out == ""
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found["in_process"]) | set(found["dropped"]) == {"precision", "optimizer"}
    if found["plan"] is None:  # the machine was too noisy for two pairs
        assert not (tmp_path / "flatout.toml").exists()
        assert f"no plan written: {found['why']}" in said.err
        return
    written = plan.read(tmp_path / "flatout.toml")
    assert written.proven
    assert dict(written.settings) == found["settings"]
    assert written.command == tuple(command)
    assert written.inputs == ("float32[256,16]",)
    assert written.evidence is not None
    assert written.evidence.ratio == pytest.approx(found["evidence"]["ratio"], rel=1e-5)
    assert written.evidence.ratio_low > 1
    assert f"next: flatout run --plan flatout.toml -- {' '.join(command)}" in said.err
