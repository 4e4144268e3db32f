"""From which runs the proof of a plan has the first gradients."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flatout.plan import Check
from flatout.tune import gradient_runs, journal, prover, statistics
from flatout.tune.budget import ProofSize, count_gradient_steps, size_proof
from flatout.tune.gradient_runs import GradientRuns
from flatout.tune.ledger import Options, Outcome
from flatout.tune.pairs import Pace, Pairs, size_relay
from flatout.tune.tuner import Tuner
from flatout.wire.record import WARMUP_STEPS

PROGRAM = """
import torch
from torch import nn
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 64)
        self.second = nn.Linear(64, 64)
        self.head = nn.Linear(64, 1)
    def forward(self, x):
        weight = self.second.weight
        if torch.is_autocast_enabled("cpu") and FACTOR != 1.0:
            weight = weight.detach() + FACTOR * (weight - weight.detach())
        y = torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), weight, self.second.bias))
        return self.head(nn.functional.dropout(y, 0.1, self.training))

net = Net()
optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
for step in range(400):
    x = torch.randn(64, 16)
    loss = nn.functional.mse_loss(net(x), x[:, :1] * x[:, 1:2])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("flatout.tune.neighbours.WAIT_SHARE", 0.0)  # other tests run beside these
    monkeypatch.setattr(statistics, "MINIMUM_PAIRS", 2)
    monkeypatch.setattr(prover, "MAXIMUM_PAIRS", 2)
    return tmp_path / "home"


def verify(folder: Path, settings: dict[str, str], factor: float = 1.0) -> Outcome:
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("FACTOR", str(factor)))
    command = [sys.executable, str(script)]
    opened = journal.begin("verify", command)
    options = Options(budget_seconds=300, isolate=False)
    made = Tuner(command, options, opened, lambda _: None, lambda *_: None, lambda _: None)
    outcome = made.verify(settings, 2)
    opened.close()
    return outcome


def requests_with_gradients(home: Path) -> list[dict[str, Any]]:
    (path,) = home.glob("tunes/*/journal.jsonl")
    lines = map(json.loads, path.read_text().splitlines())
    asked = [one for line in lines if line["kind"] == "trial" for one in line["requests"]]
    return [one for one in asked if (one["inspection"] or {}).get("gradient_steps")]


def find_check(outcome: Outcome) -> Check:
    assert outcome.verdict is not None
    (found,) = [one for one in outcome.verdict.checks if one.name == "gradients"]
    return found


@pytest.mark.tunes
def test_the_pairs_of_a_proof_record_the_gradients(tmp_path: Path, home: Path) -> None:
    outcome = verify(tmp_path, {"optimizer": "onepass"})
    check = find_check(outcome)
    assert check.result == "passed"
    assert check.measurements["parameters"] == 6
    asked = requests_with_gradients(home)
    assert len(asked) == 4
    assert all(one["relay"] is not None for one in asked)
    assert all(one["relay"]["warmup_steps"] >= 5 for one in asked)


@pytest.mark.tunes
def test_a_reshuffling_plan_shows_its_gradients_in_runs_of_its_own(
    tmp_path: Path, home: Path
) -> None:
    outcome = verify(tmp_path, {"random": "fast"})
    assert find_check(outcome).result == "passed"
    alone = [one for one in requests_with_gradients(home) if one["relay"] is None]
    assert [one["settings"] for one in alone] == [{"random": "paired"}] * 2


@pytest.mark.tunes
def test_a_wrong_gradient_that_pairs_have_recorded_is_refused(tmp_path: Path) -> None:
    outcome = verify(tmp_path, {"precision": "bf16"}, factor=1.25)
    assert outcome.evidence is None
    assert re.search("gradient norm of Net.second.weight is 1.2[345] times bare.s", outcome.why)


def test_gradients_are_recorded_before_the_first_block() -> None:
    pace = Pace(3.0, 0.01)
    alone, shared = (
        size_proof(pace, 150.0, seen_steps=200, may_share_gradients=may) for may in (False, True)
    )
    assert not alone.shares_gradients
    assert shared.shares_gradients
    assert shared.warmup_steps == count_gradient_steps(pace) == 5
    assert shared.steps - shared.warmup_steps == alone.steps - WARMUP_STEPS
    relay = size_relay(shared.steps, pace.step_s, 1, shared.warmup_steps)
    assert relay.warmup_steps >= 5
    assert relay.warmup_steps + relay.blocks * relay.block_steps == shared.steps


@pytest.mark.parametrize(("steps", "is_shared"), [(400, True), (20, True), (7, False)])
def test_a_short_run_has_no_steps_to_spare(steps: int, is_shared: bool) -> None:
    pace = Pace(3.0, 0.1)
    for given in ({"wanted_steps": steps}, {"job_steps": steps}):
        size = size_proof(pace, 900.0, seen_steps=60, may_share_gradients=True, **given)
        assert size.steps <= steps
        assert size.shares_gradients == is_shared


def test_the_time_of_gradients_is_only_set_aside_where_they_need_runs() -> None:
    def bare(shares: bool) -> Any:
        size = ProofSize(100, 5, 2, 5, shares)
        return SimpleNamespace(
            pace=Pace(2.0, 0.0), proof=size, process=SimpleNamespace(trains=True)
        )

    assert gradient_runs.estimate_s(bare(False), {"gc": "seldom"}) == 2 * 2 * 2.0
    assert gradient_runs.estimate_s(bare(True), {"gc": "seldom"}) == 0.0
    assert gradient_runs.estimate_s(bare(True), {"random": "fast"}) == 2 * 2.0


@pytest.mark.parametrize("in_relay", [True, False])
def test_gradients_are_compared_where_runs_cannot_alternate(
    monkeypatch: pytest.MonkeyPatch, in_relay: bool
) -> None:
    """Two runs at the same time may turn out to fail, after none was compared beforehand."""
    bare: Any = SimpleNamespace(proof=ProofSize(100, 5, 2, 5, True))
    runs = GradientRuns(None, None, bare, Options())  # type: ignore[arg-type]
    compared = []
    monkeypatch.setattr(runs, "compare", lambda settings, seeds: compared.append(settings))
    done: Any = SimpleNamespace(process=SimpleNamespace(gradients={}))
    pairs = Pairs({}, {"gc": "seldom"}, in_relay=in_relay)
    assert runs.begin(pairs, 2) is None
    pairs.in_relay = False
    pairs.baseline_runs.append(done)
    pairs.variant_runs.append(done)
    assert runs.end(pairs, 2) is None
    assert compared == [{"gc": "seldom"}]
