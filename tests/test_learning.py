"""``flatout run --tune``: what is faster stays on in the real training, and becomes a plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout import plan
from flatout.plan import Plan, PlanError

MANY_TENSORS = """
import torch
from torch import nn
torch.manual_seed(0)
parts = nn.ParameterList(nn.Parameter(0.1 * torch.randn(16)) for _ in range(300))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = parts
    def forward(self, x):
        return x @ torch.stack(list(self.parts)).sum(0)

net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(STEPS):
    x = torch.randn(32, 16)
    loss = (net(x) - x[:, 0]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(step, f"{loss.item():.5f}")
torch.save(net.state_dict(), "model.pt")
"""


def flatout(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flatout", *words],
        cwd=folder,
        env={**os.environ, "FLATOUT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


@pytest.mark.tunes
def test_the_faster_optimizer_stays_on_and_the_training_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MANY_TENSORS.replace("STEPS", "600"))
    job = ("--", sys.executable, "program.py")
    bare = flatout("run", *job, folder=tmp_path)
    learned = flatout("run", "--tune", *job, folder=tmp_path)
    assert learned.returncode == 0, learned.stderr
    for mine, theirs in zip(learned.stdout.split(), bare.stdout.split(), strict=True):
        assert float(mine) == pytest.approx(float(theirs), rel=1e-3, abs=1e-5)
    assert (tmp_path / "model.pt").exists()
    assert "an unproven plan of optimizer=onepass" in learned.stderr
    assert "to prove it: flatout verify --plan flatout.toml -- " in learned.stderr
    written = plan.read(tmp_path / "flatout.toml")
    assert dict(written.settings)["optimizer"] == "onepass"
    assert not written.proven
    assert written.learned is not None
    assert written.learned["optimizer"] > 1
    assert written.inputs == ("float32[32,16]",)
    again = flatout("run", "--plan", "flatout.toml", *job, folder=tmp_path)
    assert "was learned while training and is not proven" in again.stderr
    assert "not applied" not in again.stderr


@pytest.mark.long
def test_a_program_that_ends_too_early_teaches_nothing(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(MANY_TENSORS.replace("STEPS", "30"))
    done = flatout("run", "--tune", "--", sys.executable, "program.py", folder=tmp_path)
    assert done.returncode == 0
    assert "nothing was learned: the program ended before the comparison did" in done.stderr
    assert not (tmp_path / "flatout.toml").exists()


def test_a_proven_plan_is_not_written_over(tmp_path: Path) -> None:
    Plan({"gc": "seldom"}).write(tmp_path / "flatout.toml")
    done = flatout("run", "--tune", "--", sys.executable, "-c", "pass", folder=tmp_path)
    assert done.returncode == 2
    assert "holds a plan that was not learned by --tune" in done.stderr


def test_a_learned_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "flatout.toml"
    Plan({"gc": "seldom"}, learned={"gc": 1.25}).write(path)
    assert plan.read(path).learned == {"gc": 1.25}
    path.write_text(path.read_text().replace('"unproven"', '"proven"'))
    with pytest.raises(PlanError, match=r'line \d+: learned.state must be "unproven"'):
        plan.read(path)
