"""Programs that begin to do something else after the test of how they may be shared out, and what
the test itself may leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from flatout.machine import system
from flatout.parallel import checking
from flatout.parallel.kinds import Refusal, Rule
from flatout.parallel.sameness import content_digest
from tests import side_by_side
from tests.test_parallel_programs import BEGIN

PREPARED = """
class Calls(nn.Module):
    def __init__(self, function, width=4):
        super().__init__()
        self.linear = nn.Linear(6, width)
        self.function = function
    def forward(self, x, *args):
        return self.function(self, self.linear(x), *args)

def batches(steps, rows=7):
    for step in range(steps):
        yield step, torch.randn(rows, 6)

def learn(model, loss):
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    show(loss, *(p.grad.norm() for p in model.parameters() if p.grad is not None))

"""

PROGRAMS = {
    "a flag that depends on samples": """
model = Calls(lambda self, h: (h, h.isnan().any()))
for step, x in batches(5):
    if step == 3:
        x[0] = torch.nan
    out, flag = model(x)
    show(flag)
    learn(model, out[1:].square().mean())
""",
    "a count of samples that is zero at first": """
model = Calls(lambda self, h: (h, int((h.abs() > 50).any(1).sum())))
for step, x in batches(5):
    if step > 2:
        x[0] = x[6] = 1e4
    out, count = model(x)
    show(count)
    learn(model, out[1:6].square().mean())
""",
    "a penalty that is zero at first": """
model = Calls(lambda self, h: (h, torch.relu(h.abs().max() - 50)))
for step, x in batches(5):
    if step == 3:
        x[0] = 1e3
    out, penalty = model(x)
    learn(model, out.tanh().mean() + penalty)
""",
    "a word that another branch returns": """
model = Calls(lambda self, h: (h, "large" if h.max() > 50 else "small"))
for step, x in batches(5):
    if step == 3:
        x[0] = 1e3 * model.linear.weight[0].detach().sign()
    out, word = model(x)
    show(word == "large")
    learn(model, out.tanh().mean())
""",
    "an attribute that the program sets": """
model = Calls(lambda self, h: h - h.mean(0) if self.mixes else h)
model.mixes = False
for step, x in batches(5):
    model.mixes = step > 2
    learn(model, model(x).square().mean())
""",
    "a hook that comes later": """
model = Calls(lambda self, h: h.tanh())
for step, x in batches(5):
    if step == 3:
        model.linear.register_full_backward_hook(lambda _, inputs, outputs: show(*outputs[0][:, 0]))
    learn(model, model(x).square().mean())
""",
    "a condition from another call that comes later": """
source = nn.Linear(6, 4)
conditions = []
model = Calls(lambda self, h: h * conditions[-1] if conditions else h)
for step, x in batches(6):
    y = source(x)
    if step > 3:
        conditions.append(y.mean(0))
    learn(nn.ModuleList([model, source]), model(x).square().mean() + y.mean())
""",
    "a parameter of no module that comes later": """
extra = torch.zeros(4, requires_grad=True)
factors = []
model = Calls(lambda self, h: h * (1 + factors[-1]) if factors else h)
for step, x in batches(6):
    if step > 3:
        factors.append(extra)
    learn(model, model(x).square().mean())
    if step > 3:
        show(*extra.grad)
""",
    "a member of an enumeration": """
import enum
class Way(enum.Enum):
    SLOW = "slow"
    FAST = "fast"
model = Calls(lambda self, h, way: h.tanh() if way is Way.FAST else h)
for step, x in batches(4):
    learn(model, model(x, Way.FAST if step % 2 else Way.SLOW).square().mean())
""",
    "a buffer that changes at a late call": """
def function(self, h):
    self.count += 1
    if self.count == 6:
        self.scale += h.mean().detach()
    return h * self.scale
model = Calls(function)
model.count = 0
model.register_buffer("scale", torch.ones(()))
for step, x in batches(7):
    learn(model, model(x).square().mean())
    show(model.count, model.scale)
""",
    "attributes that are replaced at a late call": """
def function(self, h):
    if h.max() > 50:
        self.count += 1
        self.scale = 0.5 * self.scale + 0.5 * h.mean().detach()
        self.other = self.other + h.mean().detach()
    return h * self.scale + self.other
model = Calls(function)
model.count = 0
model.other = torch.zeros(())
model.register_buffer("scale", torch.ones(()))
for step, x in batches(7):
    if step == 5:
        x[0] = 1e3 * model.linear.weight[0].detach().sign()
    learn(model, model(x).tanh().square().mean())
    show(model.count, model.scale, model.other)
""",
    "an embedding that renormalises its rows later": """
model = nn.EmbeddingBag(20, 4, max_norm=4.0)
for step in range(6):
    x = torch.randint(20, (7, 3))
    if step == 4:
        with torch.no_grad():
            model.weight *= 10
    learn(model, model(x).square().mean())
    show(*model.weight[:, 0])
""",
    "shards of a single row": """
model = Calls(lambda self, h: h.squeeze())
for step, x in batches(6):
    learn(model, model(x[: 2 if step > 2 else 7]).tanh().square().mean(0).sum())
""",
    "shards of a single number": """
model = Calls(lambda self, h: h.squeeze(), 1)
for step, x in batches(6):
    learn(model, model(x[: 2 if step > 2 else 7]).tanh().square().mean())
""",
    "a hook on an inner tensor that keeps the gradient": """
def function(self, h):
    h = h.tanh()
    if h.requires_grad:
        h.register_hook(self.save)
    return h
class Saving(Calls):
    def save(self, gradient):
        self.saved = gradient
model = Saving(function)
model.saved = None
for step, x in batches(3):
    learn(model, model(x).square().mean())
    show(model.saved.square().sum(), len(model.saved))
""",
    "a hook on an inner tensor that reads the gradient": """
norms = []
def function(self, h):
    h = h.tanh()
    if h.requires_grad:
        h.register_hook(lambda gradient: norms.append(float(gradient.norm())))
    return h
model = Calls(function)
for step, x in batches(3):
    learn(model, model(x).square().mean())
show(*norms[-3:])
""",
    "a mode of the program": """
from torch.utils.flop_counter import FlopCounterMode
model = Calls(lambda self, h: h.tanh())
for step, x in batches(5):
    learn(model, model(x).square().mean())
    with FlopCounterMode(display=False) as counter:
        out = model(x)
    show(counter.get_total_flops(), out.sum())
""",
    "numbers in the program and in a class that count calls": """
count = 0
class Counting(Calls):
    calls = 0
    def forward(self, x):
        global count
        count += 1
        type(self).calls += 1
        return super().forward(x)
model = Counting(lambda self, h: h.tanh())
for step, x in batches(4):
    learn(model, model(x).square().mean())
    show(count, Counting.calls)
""",
}
"""Programs by what is dangerous in them."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_computes_what_it_does_alone(name: str, tmp_path: Path) -> None:
    ((alone, _, _),) = _run(name, 1, tmp_path)
    for lines, _, _ in _run(name, 2, tmp_path):
        assert len(lines) == len(alone)
        for line, expected in zip(lines, alone, strict=True):
            assert line == pytest.approx(expected, rel=1e-9, nan_ok=True)


def _run(name: str, ranks: int, folder: Path) -> list[tuple[list[list[float]], int, list[str]]]:
    found = []
    for outcome in side_by_side.run(BEGIN + PREPARED + PROGRAMS[name], ranks, folder):
        assert outcome.status == 0, outcome.stderr
        found.append(tuple(json.loads(outcome.stdout)))
    return found


def test_numbers_that_differ_between_ranks_stop_the_program(tmp_path: Path) -> None:
    program = """
import random
generator = random.SystemRandom()
model = Calls(lambda self, h, factor: h * factor)
for step, x in batches(4):
    learn(model, model(x, generator.uniform(1, 2)).square().mean())
"""
    for outcome in side_by_side.run(BEGIN + PREPARED + program, 2, tmp_path):
        assert outcome.status == 1
        assert "its inputs differ" in outcome.stderr


def test_a_tensor_of_another_type_has_a_digest() -> None:
    wrapped = TwoTensor(torch.ones(3), torch.ones(3))
    assert content_digest([wrapped]) == 0
    assert content_digest([torch.ones(3)]) != 0


def test_a_failure_of_the_test_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("no such thing")

    monkeypatch.setattr(checking, "_find_obstacle", fail)
    found = checking.find_rule(torch.nn.Linear(3, 3), (torch.ones(4, 3),), {}, 2)
    assert found == Refusal("Linear cannot be tested: LookupError: no such thing")


def test_all_ranks_need_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = torch.nn.Linear(3, 3), torch.ones(4, 3)
    monkeypatch.setattr(system, "available_bytes", lambda: 4 * 8 * 12)
    assert isinstance(checking.find_rule(linear, (x,), {}, 2), Rule)
    found = checking.find_rule(linear, (x,), {}, 3)
    assert found == Refusal("there is no memory for a copy of Linear to test")
