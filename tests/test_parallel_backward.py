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
    "a sparse gradient on some ranks": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4, sparse=True)
        self.head = nn.Linear(4, 1)
    def forward(self, x, m):
        h = torch.zeros(len(x), 4)
        if m.any():
            h = h.index_put((m,), self.embedding(x[m]))
        return self.head(h + x[:, None] * 0.1)
model = Model()
opt = torch.optim.SGD(model.parameters(), 0.1)
for step in range(8):
    x = torch.randint(20, (8,))
    m = torch.zeros(8, dtype=torch.bool)
    m[:2] = True
    if step < 2: m[6:] = True
    opt.zero_grad()
    l = model(x, m).square().mean()
    l.backward()
    g = model.embedding.weight.grad
    show(l, g.is_sparse, g.to_dense().norm())
    opt.step()
""",
    "a batch norm that only some ranks differentiate": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.expert = nn.Linear(6, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
    def forward(self, x, m):
        with torch.no_grad():
            h = self.a(x)
        if m.any():
            h = h.index_put((m,), self.expert(x[m]))
        h = self.norm(h)
        return self.head(h)
model = Model()
opt = torch.optim.SGD(model.parameters(), 0.1)
for step in range(8):
    x = torch.randn(8, 6)
    m = torch.zeros(8, dtype=torch.bool)
    m[:2] = True
    if step < 2: m[6:] = True
    opt.zero_grad()
    l = model(x, m).square().mean()
    l.backward()
    show(l, *(p.grad.norm() for p in model.parameters() if p.grad is not None))
    opt.step()
""",
    "graphs of gradients on some ranks": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 4)
        self.expert = nn.Linear(6, 4)
        self.head = nn.Linear(4, 1)
    def forward(self, x, m):
        h = self.a(x)
        if m.any():
            h = h.index_put((m,), self.expert(x[m]).tanh())
        return self.head(h).tanh()
model = Model()
opt = torch.optim.SGD(model.parameters(), 0.1)
for step in range(8):
    x = torch.randn(8, 6)
    m = torch.zeros(8, dtype=torch.bool)
    m[:2] = True
    if step < 2: m[6:] = True
    opt.zero_grad()
    l = model(x, m).square().mean()
    l.backward(create_graph=True)
    p = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    show(l, p)
    gs = torch.autograd.grad(p, list(model.parameters()), allow_unused=True)
    show(*(g.norm() for g in gs if g is not None))
    l = model(x, m).square().mean()
    gs = torch.autograd.grad(l, list(model.parameters()), create_graph=True, allow_unused=True)
    p = sum(g.square().sum() for g in gs if g is not None)
    p.backward()
    show(p, *(p.grad.norm() for p in model.parameters() if p.grad is not None))
    opt.step()
""",
    "a functional transform": """
from torch.func import functional_call, grad, jacrev, vmap
model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for step in range(4):
    x = torch.randn(7, 6)
    optimizer.zero_grad()
    out = model(x)
    parameters = dict(model.named_parameters())
    def loss_of(p, x):
        return functional_call(model, p, (x,)).square().mean()
    found = grad(loss_of)(parameters, x)
    show(*(value.norm() for value in found.values()))
    found = vmap(grad(loss_of), (None, 0))({k: p.detach() for k, p in parameters.items()}, x)
    show(*(value.norm() for value in found.values()))
    show(jacrev(lambda scale: (scale * out).sum(1))(torch.ones(1)).norm())
    slope = grad(lambda x: loss_of(parameters, x))(x)
    loss = out.square().mean() + slope.square().sum()
    loss.backward()
    show(loss, *(p.grad.norm() for p in model.parameters()))
    optimizer.step()
""",
    "a thread with a model of its own": """
import threading
model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))
other = nn.Linear(6, 1)
x = torch.randn(60, 6)
def train_other():
    other.zero_grad()
    (other(x[:5]).sum() + (model[0].weight * x[0]).sum()).backward()
def train_both(x):
    thread = threading.Thread(target=train_other)
    thread.start()
    thread.join()
    return model(x).square().mean() + other.weight.grad.norm()
train(model, TensorDataset(x), train_both)
show(other.weight.grad.norm())
""",
    "rounding that differs between ranks": """
model = nn.Linear(4, 1)
table = torch.randn(10, 4, requires_grad=True)
parallel = agent._session._parallel
# As if threads had added up in another order on each rank.
noise = 0.0 if parallel is None else 1e-7 * (2 * parallel._place.rank - 1)
optimizer = torch.optim.SGD([*model.parameters(), table], 0.1)
for step in range(12):
    ids = torch.randint(10, (7,))
    optimizer.zero_grad()
    loss = model(torch.randn(7, 4)).square().mean() + table[ids].square().mean() * (1 + noise)
    loss.backward()
    optimizer.step()
    show(table.norm(), table.grad.norm())
""",
}

PARTLY = {
    "an error of flatout that the program catches": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
    def forward(self, x):
        h = self.layer(x)
        if x[:, 0].max() > 90:
            try:
                h = F.dropout(h, 0.5)
            except BaseException:
                pass
        return h
model = Model()
x = torch.randn(60, 6)
for step in range(6):
    a = x[7 * step : 7 * step + 7].clone()
    if step == 3:
        a[0, 0] = 100
    loss = model(a).square().mean()
    model.zero_grad()
    loss.backward()
    show(loss, *(p.grad.norm() for p in model.parameters()))
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


@pytest.mark.parametrize("name", [*SHARED, *PARTLY, *WHOLE])
def test_a_program_computes_what_it_does_alone(name: str, tmp_path: Path) -> None:
    program = BEGIN + {**SHARED, **PARTLY, **WHOLE}[name]
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
        assert bool(shared) == (name not in WHOLE), whole
        assert bool(whole) == (name not in SHARED), whole


REFUSED_THREADS = {
    "in another thread": """
loss = nn.Linear(6, 4)(torch.randn(7, 6)).square().mean()
in_a_thread(loss.backward)
""",
    "in two threads at one time": """
outputs = nn.Linear(6, 4)(torch.randn(7, 6))
other = torch.ones(3, requires_grad=True)
outputs.register_hook(lambda gradient: in_a_thread(other.sum().backward))
outputs.square().mean().backward()
""",
}


@pytest.mark.parametrize("where", REFUSED_THREADS)
def test_backward_calls_in_another_thread_are_refused_by_name(where: str, tmp_path: Path) -> None:
    program = (
        BEGIN
        + """
import threading
def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
"""
        + REFUSED_THREADS[where]
    )
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 1
        assert f"does not support backward calls {where}" in outcome.stderr


INTERRUPTED = """
import signal
model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
is_first = agent._session._parallel is None or agent._session._parallel._place.rank == 0
interrupts = False
def interrupt(*args):
    if interrupts and is_first:
        signal.raise_signal(signal.SIGINT)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model
    def forward(self, x):
        {inside}
        return self.model(x)
root = Model()
def step(x):
    optimizer.zero_grad()
    loss = root(x).square().mean()
    loss.backward()
    optimizer.step()
    show(loss)
try:
    for number in range(20):
        interrupts = number == 5
        x = torch.randn(7, 6)
        {outside}
        step(x)
except KeyboardInterrupt:
    interrupts = False
    model.eval()
    show(root(torch.ones(7, 6)).sum())
    model.train()
    for _ in range(3):
        step(torch.ones(7, 6) + torch.arange(7.0)[:, None])
    torch.save(model.state_dict(), "model.pt")
    show(*(p.norm() for p in model.parameters()))
"""


@pytest.mark.parametrize("place", ["inside", "outside"])
def test_an_interrupted_program_goes_on_alone(place: str, tmp_path: Path) -> None:
    program = BEGIN + INTERRUPTED.format(
        **{"inside": "pass", "outside": "pass", place: "interrupt()"}
    )
    (alone,) = side_by_side.run(program, 1, tmp_path)
    first, other = side_by_side.run(program, 2, tmp_path)
    assert (first.status, other.status) == (0, 0), first.stderr + other.stderr
    found, shared, _ = json.loads(first.stdout)
    expected, _, _ = json.loads(alone.stdout)
    assert shared == 5
    assert len(expected) == 10
    for line, values in zip(found, expected, strict=True):
        # Before a batch norm, gradients of biases are 0 but for rounding, which Adam enlarges.
        assert line == pytest.approx(values, rel=1e-8)
    assert (tmp_path / "2-rank-0" / "model.pt").exists()


HANDLED = """
import signal
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
def evaluate(*args):
    with torch.enable_grad():  # it may come while a tensor is gathered, which records nothing
        x = torch.ones(7, 6, requires_grad=True)
        value = model(x).square().mean()
        show(value.detach(), torch.autograd.grad(value, x)[0].norm())
signal.signal(signal.SIGINT, evaluate)
parallel = agent._session._parallel
def interrupt_in(channel, name):
    original = getattr(channel, name)
    def interrupted(*args):
        setattr(channel, name, original)
        if parallel._place.rank == 0:
            signal.raise_signal(signal.SIGINT)
        return original(*args)
    setattr(channel, name, interrupted)
for number in range(8):
    if number == 5 and parallel is not None:
        interrupt_in(parallel._team.channel, "{exchange}")
    elif number == 5:
        evaluate()
    optimizer.zero_grad()
    loss = model(torch.randn(7, 6)).square().mean()
    loss.backward()
    optimizer.step()
    show(loss)
"""


@pytest.mark.parametrize("exchange", ["meet", "gather", "average"])
def test_a_signal_handler_may_call_a_module_while_ranks_meet(exchange: str, tmp_path: Path) -> None:
    program = BEGIN + HANDLED.format(exchange=exchange)
    (alone,) = side_by_side.run(program, 1, tmp_path)
    first, other = side_by_side.run(program, 2, tmp_path)
    assert (first.status, other.status) == (0, 0), first.stderr + other.stderr
    found, shared, _ = json.loads(first.stdout)
    expected, _, _ = json.loads(alone.stdout)
    assert shared == 6  # the call in which it comes is still made together
    for line, values in zip(found, expected, strict=True):
        assert line == pytest.approx(values, rel=1e-9)


def test_the_end_of_a_forked_child_is_not_that_of_the_program(tmp_path: Path) -> None:
    program = BEGIN + (
        "import os\nfrom pathlib import Path\nfrom flatout.parallel.place import place\n"
        "nn.Linear(4, 3)(torch.randn(7, 4))\nchild = os.fork()\n"
        "if child:\n"
        "    os.waitpid(child, 0)\n"
        "    show(len(list(place().run_directory.glob(f'ended-{place().rank}-*'))))\n"
        "else:\n    atexit.unregister(end)"
    )
    for outcome in side_by_side.run(program, 2, tmp_path):
        assert outcome.status == 0, outcome.stderr
        assert json.loads(outcome.stdout)[0] == [[0.0]]
