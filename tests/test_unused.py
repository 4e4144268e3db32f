"""A setting that had no effect on a program: the record says so, and a plan is not credited."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_figures import trial

from flatout import knobs
from flatout.knob import Facts
from flatout.tune.pairs import Pairs
from flatout.tune.trial import Trial
from flatout.tune.tuner import Arm, Outcome, Tuner
from flatout.wire.record import Event

PROGRAM = """
import torch
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gru, self.head = nn.Conv2d(3, 4, 3), nn.GRU(4, 8), nn.Linear(8, 2)
        self.embed = nn.Embedding(9, 3)
    def forward(self, x):
        x = self.conv(x).flatten(2).permute(2, 0, 1)
        return self.head(self.gru(x)[0].mean(0))

net = Net()
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(5):
    loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 6, 6)), torch.tensor([0, 1, 0, 1]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_a_run_says_which_settings_had_no_effect(tmp_path: Path) -> None:
    """Convolutions are called, but none that is computed otherwise; the loss is a small one."""
    (tmp_path / "program.py").write_text(PROGRAM)
    asked = ("convolution=recast", "recurrent=fused", "cross_entropy=fused", "gc=seldom")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "flatout", "run"),
            *(word for setting in asked for word in ("--set", setting)),
            *("--", sys.executable, "program.py"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "not applied" in done.stderr:
        pytest.skip(done.stderr)  # no compiler, or a torch without get_kernel
    without = [line for line in done.stderr.splitlines() if "had no effect" in line]
    assert [line.split()[1] for line in without] == ["convolution=recast", "cross_entropy=fused"]


def unused(run: Trial, *names: str) -> Trial:
    events = [Event(0.0, "unused", name, "none was called", None) for name in names]
    return Trial(dataclasses.replace(run.process, events=events), 1.0, False)


def test_what_had_no_effect_is_no_part_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = trial((10.0, [1.0] * 30, [], 1.0, 1e8))
    fast = trial((8.0, [1.0] * 30, [], 1.0, 1e8))
    sides = {
        "both": (fast, ("convolution", "recurrent")),
        "one": (fast, ("convolution",)),
        "slower in a few steps": (
            trial((8.0, [1.0] * 14 + [30.0] + [1.0] * 15, [], 1.0, 1e8)),
            (),
        ),
    }
    found = {}
    for name, (with_plan, without_effect) in sides.items():
        plan = unused(with_plan, *without_effect)

        def alternate(made: Pairs, *_: object, plan: Trial = plan) -> None:
            made.firsts, made.seconds = [slow] * 3, [plan] * 3

        accepted: list[dict[str, str]] = []
        said: list[str] = []
        outcome = Outcome(arms=[Arm({"convolution": "recast"}), Arm({"recurrent": "fused"})])
        asked = SimpleNamespace(
            _outcome=outcome,
            _prover=SimpleNamespace(
                gradients_refusal=lambda *_: None, gradients_pass=None, passes=lambda *_: True
            ),
            _can_relay=lambda _: False,
            _say=said.append,
            _steps=30,
            _alternate=alternate,
            _is_enough=None,
            _refusal=lambda _: None,
            _accept=lambda settings, made: accepted.append(settings),  # noqa: B023
            _begin=lambda *_: None,
            _changed=lambda: None,
        )
        asked._leave_out = lambda *args: Tuner._leave_out(asked, *args)  # type: ignore[arg-type] # noqa: B023
        Tuner._settle(asked, {"convolution": "recast", "recurrent": "fused"}, [])  # type: ignore[arg-type]
        found[name] = (accepted, outcome.why, [arm.state for arm in outcome.arms])
    assert found["both"][0] == []
    assert found["both"][1] == ("convolution=recast, recurrent=fused has no effect on this program")
    assert found["both"][2] == ["left out", "left out"]
    assert found["one"][0] == [{"recurrent": "fused"}]
    assert found["one"][2] == ["left out", "not tried"]
    assert found["slower in a few steps"][0] == []
    assert (
        "1.25x (1.25 to 1.25, 3 pairs) but for a few steps, and 0."
        in found["slower in a few steps"][1]
    )


def test_knobs_behind_operators_say_so() -> None:
    """Those whose whole effect the record can count."""
    counted = {name for name, knob in knobs.registry().items() if knob.behind_operators}
    assert counted == {
        *("convolution", "cross_entropy", "elementwise", "embedding", "random", "recurrent")
    }
    assert not knobs.get("convolution").offer(Facts("cpu", operators={"aten::mm": 0.5})).settings


@pytest.mark.parametrize("kind", ["attention", "layer", "lstm"])
def test_without_gradients_torch_takes_other_kernels(kind: str) -> None:
    """Why ``evaluation`` is not called bitwise."""
    torch.manual_seed(0)
    x = torch.randn(4, 33, 64)
    if kind == "attention":
        module: torch.nn.Module = torch.nn.MultiheadAttention(64, 4, batch_first=True).eval()
        args: tuple[torch.Tensor, ...] = (x, x, x)
    elif kind == "layer":
        module, args = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval(), (x,)
    else:
        module, args = torch.nn.LSTM(64, 64).eval(), (x,)
    recorded = module(*args)
    with torch.no_grad():
        plain = module(*args)
    one, other = (o[0] if isinstance(o, tuple) else o for o in (recorded, plain))
    assert torch.allclose(one, other, atol=1e-5)
    assert knobs.get("evaluation").exactness["no_grad"] == "reordered"
