"""Losses and other sums over samples inside of a module: what ranks compute is what one process
computes, or the call is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from flatout.parallel import interior, shards
from flatout.parallel.checking import find_rule
from flatout.parallel.kinds import Refusal, Rule
from flatout.parallel.placement import Placement, UnshareableError
from tests import side_by_side
from tests.test_parallel_programs import BEGIN
from tests.test_parallel_rules import Calls

B, T, D = 6, 5, 8


@pytest.fixture(autouse=True)
def prepared() -> Iterator[None]:
    torch.manual_seed(0)
    undo = interior.install()
    yield
    undo()


def found(function: Callable[..., Any], *args: Any, size: int = 2) -> Rule | Refusal:
    return find_rule(Calls(function), (torch.randn(B, D), *args), {}, size)


def places(function: Callable[..., Any], *args: Any) -> list[tuple[str, int | None, bool]]:
    rule = found(function, *args)
    assert isinstance(rule, Rule), rule
    return [(place.operator, place.dim, place.is_outer) for place in rule.sums]


def reason(function: Callable[..., Any], *args: Any) -> str:
    refusal = found(function, *args)
    assert isinstance(refusal, Refusal), refusal
    return refusal.reason


# What is found by test


def padded() -> torch.Tensor:
    """Classes of samples, some of which do not count."""
    target = torch.randint(D, (B,))
    target[0] = target[2] = -100
    return target


def test_a_loss_beside_other_outputs() -> None:
    rule = found(lambda h, y: {"loss": F.cross_entropy(h, y), "logits": h, "no": None}, padded())
    assert isinstance(rule, Rule), rule
    assert (rule.inputs, rule.outputs) == ((0, 0), (None, 0))
    alone = found(F.cross_entropy, padded())
    assert isinstance(alone, Rule), alone
    assert (alone.inputs, alone.outputs) == ((0, 0), (None,))


def test_terms_of_samples_that_share_a_dimension() -> None:
    def tokens(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = h[:, None] * torch.linspace(0.5, 1, T)[:, None]
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    y = torch.randint(D, (B, T))
    assert places(tokens, y) == [("cross_entropy_loss", 0, True)]

    def sequence_first(h: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = h * torch.linspace(0.5, 1, T)[:, None, None]
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    assert places(sequence_first, y.T.contiguous()) == [("cross_entropy_loss", 0, False)]


def test_what_is_not_added_up_over_samples_stays() -> None:
    weight = torch.randn(3, 3)
    function = lambda h: h.mean() + weight.square().sum() + h.sum(1).mean()  # noqa: E731
    expected = [("mean", 0, True), ("sum", None, True), ("mean", 0, True)]
    assert places(function) == expected


def test_sums_stay_in_shards_if_only_that_is_right() -> None:
    """As that of energies, whose gradient is the force on each sample."""

    def forces(h: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(h.square().sum(), h, create_graph=True)[0]

    assert places(forces) == []
    assert "computes gradients" in reason(lambda h: (forces(h), h.mean()))


def test_a_number_of_samples_that_is_zero_at_first() -> None:
    assert places(lambda h: h / (1 + (h.abs() > 50).sum())) == [("sum", 0, True)]
    assert places(lambda h: (h, (h.abs() > 50).sum())) == [("sum", 0, True)]
    assert places(lambda h: (h, h.mean().item())) == [("mean", 0, True)]
    assert places(lambda h: (h, int((h.abs() > 50).sum()))) == [("sum", 0, True)]


MIXING: dict[str, Callable[[torch.Tensor], Any]] = {
    "a contrastive loss": lambda h: F.cross_entropy(h @ h.T, torch.arange(len(h))),
    "a weak mixture": lambda h: (h + 1e-9 * h.flip(0)).square().mean(),
    "a product with another sample": lambda h: (h * h.flip(0)).mean(),
    "a deviation": lambda h: h.std(),
    "a small deviation": lambda h: h.mean() + 1e-9 * h.std(),
    "the largest loss": lambda h: h.square().mean(1).max(),
    "the largest loss that is small": lambda h: h.mean() + 1e-9 * h.detach().amax(),
    "the first sample": lambda h: h[0].sum() + h.mean(),
    "a penalty that is zero at first": lambda h: h.mean() + torch.relu(h.abs().max() - 50),
    "balanced experts": lambda h: (
        h.mean() + (h.softmax(1).mean(0) * F.one_hot(h.argmax(1), D).double().mean(0)).sum()
    ),
    "a sum over the number of rows": lambda h: h.sum() / h.shape[0],
    "no errors over the number of rows": lambda h: (h.mean(), (h > 50).sum() / h.shape[0]),
    "a mean that counts samples of another size": lambda h: h.sum() / h[: len(h) // 2].numel(),
    "one sum for each sample": lambda h: torch.stack([row.sum() for row in h]).mean(),
    "chosen samples": lambda h: h[h[:, 0] > 0].mean(),
    "a loss of the mean": lambda h: (h.mean(0) - 1).square().sum(),
    "the number of samples": lambda h: (h.mean(), h.shape[0]),
    "half of the loss of the first samples": lambda h: h[: len(h) // 2].mean(),
    "complex numbers": lambda h: (h + 1j).mean().abs(),
    "a variance that is added up": lambda h: (h - h.mean(0)).square().mean(),
}


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("name", MIXING)
def test_losses_that_are_refused(name: str, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        why = reason(MIXING[name])
    told = "mixes samples", "depend", "something else", "nothing with a row"
    assert any(words in why for words in told), why


def test_a_gradient_that_is_not_linear_in_the_loss() -> None:
    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.sign()

    assert "backward pass" in reason(lambda h: Sign.apply(h).square().mean())


def test_sums_in_a_function_of_the_program() -> None:
    """Its backward pass does not know that the sum is one over all ranks."""

    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.shape = x.shape
            return x.mean()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.expand(ctx.shape) / 48

    assert "backward pass" in reason(Mean.apply)
    with torch.no_grad():
        assert places(Mean.apply) == [("mean", 0, True)]


def test_other_sums_than_those_that_were_tested() -> None:
    placed = (Placement("mean", 2, 0),)
    calls: list[tuple[Callable[[torch.Tensor], Any], str]] = [
        (lambda x: (x.mean(), x.mean()), "adds up more"),
        (lambda x: x, "adds up less"),
        (torch.sum, "something else"),
        (lambda x: x.flatten().mean(), "something else"),
        (lambda x: x[1:].mean(), "something else"),
    ]
    x = torch.randn(4, 3)
    for call, words in calls:
        with (
            pytest.raises(UnshareableError, match=words),
            shards.shard(0, 4, 8, list, sums=placed),
        ):
            call(x)


def test_operators_are_left_as_they_are_outside_of_shards() -> None:
    x, y = torch.randn(B, D), padded()
    expected = x.sum(), x.mean(), F.cross_entropy(x, y), F.mse_loss(x, 2 * x)
    with shards.observing() as seen:
        inside = x.sum(), x.mean(), F.cross_entropy(x, y), F.mse_loss(x, 2 * x)
    assert all(map(torch.equal, inside, expected))
    names = [addition.operator for addition in seen.additions]
    assert names == ["sum", "mean", "cross_entropy_loss", "mse_loss"]


# Caches of keys and values

CACHES = """
class Layer:
    def __init__(self):
        self.keys = None
        self.is_filled = False
        self.kind = torch.float64

class Cache:
    def __init__(self):
        self.layers = []
        self.all = []

    def update(self, keys):
        self.layers.append(Layer())
        self.layers[-1].keys = keys
        self.layers[-1].is_filled = True
        self.all.append(2 * keys)
        return keys

for kind in (Layer, Cache):
    kind.__module__ = "transformers.cache_utils"
"""


def test_a_cache_is_returned_but_not_cut() -> None:
    names: dict[str, Any] = {"torch": torch}
    exec(CACHES, names)
    make = names["Cache"]

    def function(h: torch.Tensor, cache: Any = None) -> dict[str, Any]:
        cache = make() if cache is None else cache
        return {"loss": cache.update(h).mean(), "cache": cache}

    rule = found(function)
    assert isinstance(rule, Rule), rule
    assert rule.outputs == (None, 0, 0)
    assert "gets a Cache" in reason(function, make())


# What ranks compute

PREPARED = """
class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(6, 8)
        self.function = function
    def forward(self, x, *args, **kwargs):
        return self.function(self.linear(x), *args, **kwargs)

def learn(model, loss):
    model.zero_grad()
    loss.backward()
    show(loss, *(p.grad.norm() for p in model.parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad

def padded(*shape):
    target = torch.randint(8, shape)
    target[torch.rand(shape) < 0.4] = -100
    return target

"""

PROGRAMS = {
    "losses": """
weight = torch.linspace(0.1, 2, 8)
def ctc(h, y):
    h = h.view(-1, 4, 2).transpose(0, 1).log_softmax(2)
    return F.ctc_loss(h, y, torch.full((h.shape[1],), 4), y[:, 0])
classes, images = lambda: padded(7), lambda: padded(7, 2, 2)
other = lambda: torch.randn(7, 8)
normalize = lambda h: F.batch_norm(h, None, None, None, None, True)
parts = lambda: torch.rand(7, 8).softmax(1)
losses = [
    (F.cross_entropy, classes),
    (lambda h, y: F.cross_entropy(h, y, weight), classes),
    (lambda h, y: F.cross_entropy(h, y, label_smoothing=0.1), classes),
    (lambda h, y: F.cross_entropy(h, y, weight, label_smoothing=0.1), classes),
    (lambda h, y: F.cross_entropy(h, y % 8, reduction="sum", ignore_index=4), classes),
    (lambda h, y: F.cross_entropy(h, y, weight, label_smoothing=0.1), parts),
    (lambda h, y: F.cross_entropy(h.view(-1, 2, 4), y % 2), lambda: torch.randint(8, (7, 4))),
    (lambda h, y: F.nll_loss(h.log_softmax(1), y, weight), classes),
    (lambda h, y: F.nll_loss(h.view(-1, 2, 2, 2), y.clamp(-100, 1), weight[:2]), images),
    (F.mse_loss, other),
    (lambda h, y: F.mse_loss(h, y, reduction="sum"), other),
    (lambda h, y: F.mse_loss(h, y[:, :1].expand_as(h)), other),
    (F.l1_loss, other),
    (lambda h, y: F.smooth_l1_loss(h, y, beta=0.3), other),
    (lambda h, y: F.huber_loss(h, y, delta=0.3), other),
    (lambda h, y: F.soft_margin_loss(h, y.sign()), other),
    (lambda h, y: F.binary_cross_entropy(h.sigmoid(), y, weight), parts),
    (lambda h, y: F.binary_cross_entropy_with_logits(h, y, pos_weight=weight), parts),
    (lambda h, y: F.kl_div(h.log_softmax(1), y, reduction="sum"), parts),
    (ctc, lambda: torch.ones(7, 2, dtype=torch.long)),
    (lambda h, y: F.triplet_margin_loss(h, y, -y), other),
    (lambda h, y: (h.square() * (y > 0)).sum() / (y > 0).sum(), other),
    (lambda h, y: h.square().mean().sqrt() * y.mean() + (h > 0).sum() * h.mean(), other),
    (lambda h, y: (h / h.square().sum()).square().mean(), other),
    (lambda h, y: F.cross_entropy(F.dropout(normalize(h), 0.3), y) + normalize(h).max(1)[0].mean(),
     classes),
]
def function(h, targets):
    return [loss(h, target) for (loss, _), target in zip(losses, targets)]
model = Calls(function)
for _ in range(3):
    found = model(torch.randn(7, 6), [make() for _, make in losses])
    show(*found)
    learn(model, sum(factor * loss for factor, loss in enumerate(found, 1)))
""",
    "padding that differs between shards": """
model = Calls(lambda h, y: (h, F.cross_entropy(h.view(-1, 8), y.view(-1))))
for step in range(6):
    y = padded(7)
    if step in (2, 4):
        y[: 4] = -100
    if step == 3:
        y[3 :] = -100
    h, loss = model(torch.randn(7, 6), y)
    show(h.sum())
    learn(model, loss)
y[:] = -100
loss = model(torch.randn(7, 6), y)[1]
show(loss.isnan())
""",
    "lengths that change": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8)
        self.head = nn.Linear(8, 20)
    def forward(self, x, targets=None):
        h = self.head(self.lstm(self.embedding(x))[0])
        if targets is None:
            return h, None
        return h, F.cross_entropy(h.view(-1, 20), targets.reshape(-1), ignore_index=-1)
model = Model()
for length, rows in ((5, 7), (9, 7), (3, 6), (5, 3), (4, 8)):
    x = torch.randint(20, (length + 1, rows))
    y = x[1:].masked_fill(torch.rand(length, rows) < 0.3, -1)
    h, loss = model(x[:-1], y)
    show(h.square().sum())
    learn(model, loss + 0.01 * h.square().mean())
with torch.no_grad():
    show(model(x[:-1], y)[1], model(x)[0].sum())
with torch.inference_mode():
    show(model(x[:-1], y)[1])
""",
    "a number of tokens for several batches": """
model = Calls(lambda h, y, count=None, **kwargs: {
    "loss": F.cross_entropy(h, y, reduction="sum") / count, "logits": h
})
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
for step in range(4):
    batches = [(torch.randn(rows, 6), padded(rows)) for rows in (7, 7, 4)]
    count = sum((y != -100).sum() for _, y in batches)
    for x, y in batches:
        output = model(x, y=y, count=count)
        output["loss"].backward()
        show(output["loss"])
    show(nn.utils.clip_grad_norm_(model.parameters(), 0.1))
    optimizer.step()
    optimizer.zero_grad()
""",
    "what the program computes with a loss": """
model = Calls(lambda h, y: {"loss": F.cross_entropy(h, y), "penalty": h.square().mean(), "h": h})
factor = torch.ones((), requires_grad=True)
x = torch.randn(7, 6, requires_grad=True)
for step in range(4):
    y = padded(7)
    found = model(x, y)
    total = (found["loss"] * factor).sqrt() + found["penalty"] * found["h"].std()
    learn(model, total + model.linear.weight.norm())
    show(*x.grad.flatten(), factor.grad)
    found = model(x, y)
    slopes = torch.autograd.grad(found["loss"] + found["h"].pow(3).mean(), x, create_graph=True)
    learn(model, slopes[0].square().sum() + found["loss"])
    show(*x.grad.flatten())
""",
    "a loss through a checkpoint": """
from torch.utils.checkpoint import checkpoint
def function(h, y, again):
    def compute(h):
        return F.cross_entropy(F.dropout(h, 0.2), y)
    return checkpoint(compute, h, use_reentrant=again)
model = Calls(function)
for step in range(4):
    learn(model, model(torch.randn(7, 6), padded(7), step % 2 == 0))
""",
    "a cache of keys and values": CACHES
    + """
def function(h):
    cache = Cache()
    h = cache.update(h.tanh()) + cache.update(h)
    return {"loss": h.square().mean(), "logits": h, "cache": cache}
model = Calls(function)
for step in range(3):
    found = model(torch.randn(7, 6))
    cache = found["cache"]
    keys = [layer.keys for layer in cache.layers]
    show(*(len(tensor) for tensor in keys + cache.all), type(cache) is Cache)
    show(keys[1].std(), found["logits"].std())
    learn(model, found["loss"] + keys[0].std() + cache.all[1].std())
""",
    "a generator inside of a loss": """
model, judge = Calls(lambda h: h.tanh()), nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.judge = judge
    def forward(self, h, real):
        return F.binary_cross_entropy_with_logits(self.judge(h), real)
loss = Loss()
for step in range(4):
    learn(nn.ModuleList([model, judge]), loss(model(torch.randn(7, 6)), torch.rand(7, 1).round()))
""",
    "a statistic of the samples in a buffer": """
class Model(Calls):
    def forward(self, x):
        h = self.linear(x)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean())
        self.seen += int((h > 0).sum())
        return (h - self.mean).square().mean()
model = Model(None)
model.seen = 0
model.register_buffer("mean", torch.zeros(()))
for step in range(3):
    learn(model, model(torch.randn(7, 6)))
    show(model.mean, model.seen)
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_computes_what_it_does_alone(name: str, tmp_path: Path) -> None:
    program = BEGIN + PREPARED + PROGRAMS[name]
    runs = {}
    for ranks in (1, 2, 3):
        outcomes = side_by_side.run(program, ranks, tmp_path)
        assert all(outcome.status == 0 for outcome in outcomes), outcomes[-1].stderr
        runs[ranks] = [json.loads(outcome.stdout) for outcome in outcomes]
    ((alone, _, _),) = runs[1]
    for lines, shared, whole in runs[2] + runs[3]:
        assert shared, whole
        assert not whole
        assert len(lines) == len(alone)
        for line, expected in zip(lines, alone, strict=True):
            assert line == pytest.approx(expected, rel=1e-10, abs=1e-14)
