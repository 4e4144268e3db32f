"""Backward calls that are unlike ``loss.backward()``, in programs that nobody has told how they are
to be shared out, in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import side_by_side
from tests.test_parallel_programs import BEGIN

SHARED = {
    "a reentrant checkpoint": """
from torch.utils.checkpoint import checkpoint
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 1)
    def forward(self, x):
        return self.head(checkpoint(self.layer, self.first(x), use_reentrant=True))
model = Model()
train(model, TensorDataset(torch.randn(60, 6)), lambda x: model(x).square().mean())
show(torch.rand(()))
""",
}

WHOLE = {
    "a backward call in the forward pass": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 1)
    def forward(self, x):
        x = x.clone().requires_grad_()
        self.layer(x).tanh().sum().backward()
        return self.layer(x.detach()) + x.grad.sum(1, keepdim=True)
model = Model()
train(model, TensorDataset(torch.randn(60, 6)), lambda x: model(x).square().mean())
""",
}


@pytest.mark.parametrize("name", [*SHARED, *WHOLE])
def test_a_program_computes_what_it_does_alone(name: str, tmp_path: Path) -> None:
    program = BEGIN + {**SHARED, **WHOLE}[name]
    found = {}
    for ranks in (1, 2):
        found[ranks] = []
        for outcome in side_by_side.run(program, ranks, tmp_path):
            assert outcome.status == 0, outcome.stderr
            found[ranks].append(json.loads(outcome.stdout))
    ((alone, _, _),) = found[1]
    for lines, shared, whole in found[2]:
        assert [len(line) for line in lines] == [len(line) for line in alone]
        for line, expected in zip(lines, alone, strict=True):
            assert line == pytest.approx(expected, rel=1e-9)
        assert bool(shared) == (name in SHARED), whole
