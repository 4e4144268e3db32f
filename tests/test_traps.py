"""Knobs that are fast and wrong, planted: tune must leave each of them out, and keep the good one.

All of them spare the program work, so they win every comparison of times.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import planted
import pytest

PROGRAM = """
import torch
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(16, 64), nn.Linear(64, 1)
    def forward(self, x):
        work = torch.ones(260, 260)
        for _ in range(12 - 2 * len(getattr(torch, "planted", ()))):
            work @ work
        return self.head(torch.tanh(self.inner(x)))

net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for step in range(100_000):
    x = torch.randn(64, 16)
    loss = (net(x) - x[:, :1].sin()).square().mean() + 0.01 * torch.randn(())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""

WRONG_GRADIENT = """
handles = []
def wrong(call, module, args, kwargs):
    if not handles:
        weight = next(module.parameters())
        handles.append(weight.register_hook(lambda gradient: 1.5 * gradient))
    return call(module, *args, **kwargs)
host.forward_wrappers.append(wrong)
"""

RIGHT_AGAIN = """
host.forward_wrappers.remove(wrong)
for handle in handles:
    handle.remove()
"""

DIVERGES_LATE = """
count = [0]
def spoil(optimizer):
    count[0] += 1
    if count[0] > 45:
        for group in optimizer.param_groups:
            with torch.no_grad():
                group["params"][0].mul_(0.3)
host.after_optimizer_step.append(spoil)
"""

LEAKS = """
leaked = []
def leak(optimizer):
    leaked.append(bytearray(b"x") * 2**16)
host.after_optimizer_step.append(leak)
"""

HANGS = """
import time
time.sleep(1000)
"""

WRITES = """
from pathlib import Path
Path("written-by-a-trial.txt").write_text("x")
Path("program.py").write_text("spoilt")
"""

SLOWER = """
screens = host.request.comparison is not None and not host.request.comparison.arms[0]
def slower(call, module, args, kwargs):
    work = torch.ones(260, 260)
    for _ in range(2):
        work @ work
    work[:94] @ work
    return call(module, *args, **kwargs)
if not screens:
    host.forward_wrappers.append(slower)
"""
"""It wins the first trial, where it spares 2 of 12 multiplications; in all others it is 3 % slower,
as it costs 2.36 more than it spares."""

FAST_AGAIN = """
if not screens:
    host.forward_wrappers.remove(slower)
"""

TRAPS = {
    "trap_gradient": (WRONG_GRADIENT, RIGHT_AGAIN),
    "trap_late": (DIVERGES_LATE, "host.after_optimizer_step.remove(spoil)"),
    "trap_leak": (LEAKS, "host.after_optimizer_step.remove(leak)"),
    "trap_hang": (HANGS, "pass"),
    "trap_write": (WRITES, "pass"),
}


@pytest.mark.traps
def test_fast_and_wrong_knobs_are_left_out_and_the_good_one_is_kept(tmp_path: Path) -> None:
    knobs = {name: planted.knob(name, *what) for name, what in TRAPS.items()}
    knobs["honest"] = planted.knob("honest")
    site = planted.plant(tmp_path, knobs)
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    quick = "from flatout.tune import pairs, prover, statistics\npairs.LIMIT_EXTRA_S = 8\n"
    quick += "statistics.MINIMUM_PAIRS = prover.MAXIMUM_PAIRS = 3"
    done = planted.run(
        site,
        *("tune", "--steps", "60", "--budget", "30s", "--json", "found.json"),
        *("--knobs", ",".join(knobs), "--", sys.executable, "program.py"),
        folder=folder,
        before=quick,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    why = {next(iter(arm["settings"])): arm["why"] for arm in found["arms"]}
    assert "gradient" in why["trap_gradient"], done.stderr
    assert "loss" in why["trap_late"], done.stderr
    assert "memory grows" in why["trap_leak"] or "peak memory" in why["trap_leak"], done.stderr
    assert "far longer than expected" in why["trap_hang"], done.stderr
    assert set(found["settings"]) == {"honest", "trap_write"}, done.stderr
    left = {path.name for path in folder.iterdir()}
    assert left == {"program.py", "found.json", "flatout.toml", "flatout-home"}
    assert (folder / "program.py").read_text() == PROGRAM


@pytest.mark.traps
def test_verify_looks_at_gradients_too_and_keeps_what_was_proven(tmp_path: Path) -> None:
    """A wrong factor that Adam divides out again hardly shows in a loss."""
    knobs = {"trap_gradient": planted.knob("trap_gradient", WRONG_GRADIENT, RIGHT_AGAIN)}
    knobs["honest"] = planted.knob("honest")
    site = planted.plant(tmp_path, knobs)
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)

    def verified(plan: str, *options: str) -> tuple[int, str, str]:
        options = (*options, "--quiet", "-v", "--", sys.executable, "program.py")
        done = planted.run(site, "verify", "--plan", plan, *options, folder=folder)
        return done.returncode, done.stderr, (folder / plan).read_text()

    (folder / "wrong.toml").write_text('[plan]\ntrap_gradient = "on"\n')
    code, said, written = verified("wrong.toml", "--steps", "25", "--seeds", "2")
    assert code == 1, said
    assert "trap_gradient=on is not proven: the gradient of Net.inner.weight is 1.5 times" in said
    assert "evidence" not in written
    (folder / "right.toml").write_text('[plan]\nhonest = "on"\n')
    code, said, _ = verified("right.toml", "--steps", "40", "--seeds", "2")
    assert code == 0, said
    assert "  gradients: passed" in said
    assert "proven, written into right.toml\n" in said
    code, said, second = verified("right.toml", "--steps", "25", "--seeds", "2", "--seed", "7")
    assert code == 0, said
    assert "the new proof is stored beside the old one, which covers 40 steps and 2 seeds" in said
    assert "steps = 40" in second
    assert "first_seed = 7" in second


@pytest.mark.traps
@pytest.mark.parametrize("others", [(), ("honest",)], ids=["alone", "with an honest one"])
def test_a_slower_knob_that_wins_one_trial_is_left_out(
    tmp_path: Path, others: tuple[str, ...]
) -> None:
    knobs = {"trap_slower": planted.knob("trap_slower", SLOWER, FAST_AGAIN)}
    knobs |= {name: planted.knob(name) for name in others}
    site = planted.plant(tmp_path, knobs)
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    done = planted.run(
        site,
        *("tune", "--steps", "60", "--budget", "90s", "--json", "found.json"),
        *("--knobs", ",".join(knobs), "--", sys.executable, "program.py"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    ratios = {next(iter(arm["settings"])): arm["ratio"] for arm in found["arms"]}
    assert ratios["trap_slower"]["low"] > 1, done.stderr
    assert set(found["settings"]) == set(others), done.stderr


@pytest.mark.traps
@pytest.mark.parametrize("seed", range(4))
def test_of_knobs_that_do_nothing_none_is_claimed(tmp_path: Path, seed: int) -> None:
    """A tune of the program against itself; replays of recorded steps claim in 1 or 2 of 100."""
    names = [f"nothing{number}" for number in range(8)]
    site = planted.plant(tmp_path, {name: planted.knob(name) for name in names})
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM.replace("12 - 2 * len(", "12 - 0 * len("))
    done = planted.run(
        site,
        *("tune", "--steps", "60", "--budget", "60s", "--seed", str(seed), "--json", "found.json"),
        *("--knobs", ",".join(names), "--", sys.executable, "program.py"),
        folder=folder,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert found["settings"] == {}, done.stderr
    tried = [arm for arm in found["arms"] if arm["ratio"] is not None]
    assert len(tried) == len(names), done.stderr
    assert not (folder / "flatout.toml").exists()
