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
from flatout.tune.ledger import Ledger, LedgerEntry, Outcome
from flatout.tune.pairs import Pairs
from flatout.tune.proof import Verdict
from flatout.tune.prover import ProofAttempt
from flatout.tune.trial import Trial
from flatout.tune.tuner import Tuner
from flatout.wire.lines import AgentEvent

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
    events = [AgentEvent(0.0, "unused", name, "none was called", None) for name in names]
    return Trial(dataclasses.replace(run.process, events=events), 1.0, False)


def test_what_had_no_effect_is_no_part_of_a_plan() -> None:
    slow = trial((10.0, [1.0] * 30, [], 1.0, 1e8))
    fast = trial((8.0, [1.0] * 30, [], 1.0, 1e8))
    sides = {
        "both": ([fast] * 3, ("convolution", "recurrent")),
        "one": ([fast] * 3, ("convolution",)),
        "slower in a few steps": (
            [
                trial((8.0, [30.0 if n == place else 1.0 for n in range(30)], [], 1.0, 1e8))
                for place in (14, 18, 22)
            ],
            (),
        ),
    }
    found = {}
    for name, (with_plan, without_effect) in sides.items():
        plan = [unused(one, *without_effect) for one in with_plan]
        settings = {"convolution": "recast", "recurrent": "fused"}
        verdict = Verdict(True, "", "bitwise", 30, True, ())
        made = Pairs({}, settings, [slow] * 3, plan)
        ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
        outcome = ledger.outcome = Outcome(
            entries=[LedgerEntry({k: s}) for k, s in settings.items()]
        )
        accepted: list[dict[str, str]] = []
        asked = SimpleNamespace(
            _ledger=ledger,
            _accept=lambda settings, attempt: accepted.append(settings),  # noqa: B023
        )
        attempt = ProofAttempt(made, None, verdict, lambda _: True)
        Tuner._decide(asked, settings, attempt)  # type: ignore[arg-type]
        found[name] = (accepted, outcome.why, [entry.state for entry in outcome.entries])
    assert found["both"][0] == []
    assert found["both"][1] == ("convolution=recast, recurrent=fused has no effect on this program")
    assert found["both"][2] == ["left out", "left out"]
    assert found["one"][0] == [{"recurrent": "fused"}]
    assert found["one"][2] == ["left out", "not tried"]
    assert found["slower in a few steps"][0] == []
    assert (
        "1.25x (1.25 to 1.25, 3 pairs) without outlier steps, but 0."
        in found["slower in a few steps"][1]
    )


def test_knobs_of_the_whole_process_wait_for_no_call() -> None:
    waiting = {name for name, knob in knobs.registry().items() if knob.waits_for_calls}
    assert knobs.registry().keys() - waiting == {
        *("allocator", "code_pages", "cuda_allocator", "cudnn", "denormals", "gc", "mkl"),
        *("ranks", "threads"),
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
