"""Methods of modules that are the forward pass count as outermost calls, and no others do."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_watch import Watched
from torch import nn

from tests.hosts import host_in


class Policy(nn.Module):
    """An actor and a critic that are trained by a method."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
        self.actor, self.critic = nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.actor(self.body(x)).argmax(1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def evaluate(self, x: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.features(x)
        scores = self.actor(found)
        taken = torch.distributions.Categorical(logits=scores)
        return self.critic(found), taken.log_prob(actions), taken.entropy()

    def in_parts(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {str(row): value for row, value in enumerate([self.body(x) for _ in range(2)])}

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).square().mean()

    def update(self, x: torch.Tensor) -> torch.Tensor:
        found = self.body(x)
        found.sum().backward()
        return found

    def parts(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        yield self.body(x)

    def itself(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self(x)[:, None]

    def detached(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).detach()


METHODS = dict(vars(Policy))


def is_watched(owner: type, name: str) -> bool:
    """Whether the method of a class is another function, which stands in for its own."""
    return inspect.unwrap(vars(owner)[name]) is not vars(owner)[name]


class Derived(Policy):
    def evaluate(self, x: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value, *others = super().evaluate(x, actions)
        return 2 * value, *others


@pytest.fixture
def watched() -> Iterator[Watched]:
    watched = Watched(live=True)
    yield watched
    watched.hooks.remove()
    assert not watched.failures


def losses_of(result: Any) -> torch.Tensor:
    if isinstance(result, dict):
        result = tuple(result.values())
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return torch.stack([part.square().mean() for part in parts]).sum()


def train(net: Policy, compute: Callable[[Any, torch.Tensor], Any], steps: int = 5) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = []
    for _ in range(steps):
        loss = losses_of(compute(net, torch.randn(6, 4)))
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def evaluates(net: Policy, x: torch.Tensor) -> Any:
    return net.evaluate(x, torch.zeros(6, dtype=torch.int64))


FORWARD_PASSES = {
    "evaluate": evaluates,
    "in_parts": lambda net, x: net.in_parts(x),
    "features": lambda net, x: net.features(x),
}
OTHERS = {
    "update": lambda net, x: net.update(x).detach() + net.body(x),
    "parts": lambda net, x: next(net.parts(x)),
    "detached": lambda net, x: net.detached(x) + net.body(x),
    "itself": lambda net, x: net.body(x),
}


@pytest.mark.parametrize("name", FORWARD_PASSES)
def test_a_method_that_is_the_forward_pass_is_one_call(watched: Watched, name: str) -> None:
    net = Policy()
    bare = train(copy.deepcopy(net), FORWARD_PASSES[name])
    original = METHODS[name]
    assert train(net, FORWARD_PASSES[name]) == bare
    assert is_watched(Policy, name)
    assert [turn.forwards for turn in watched.closed][-2:] == [1, 1]
    assert any(root is net for root in watched.hooks.root_search.roots)
    assert inspect.unwrap(getattr(Policy, name)) is original
    assert inspect.signature(getattr(net, name)) == inspect.signature(getattr(Policy(), name))
    assert b"flatout" not in pickle.dumps(net)
    watched.hooks.remove()
    assert vars(Policy)[name] is original


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_that_does_something_else_is_left_where_it_is(watched: Watched, name: str) -> None:
    net = Policy()
    original = METHODS[name]
    bare = train(copy.deepcopy(net), OTHERS[name])
    assert train(net, OTHERS[name]) == bare
    assert vars(Policy)[name] is original


def test_a_method_inside_of_one_that_returns_the_loss(watched: Watched) -> None:
    net = Policy()
    bare = train(copy.deepcopy(net), lambda net, x: net.loss(x))
    original = METHODS["loss"]
    assert train(net, lambda net, x: net.loss(x)) == bare
    assert vars(Policy)["loss"] is original
    assert is_watched(Policy, "features")


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.features(x).tanh()


def test_a_watched_method_has_its_source(watched: Watched) -> None:
    net: Any = Scripted()
    source = inspect.getsource(Scripted.features)
    train(net, FORWARD_PASSES["features"])
    assert is_watched(Scripted, "features")
    assert inspect.getsource(net.features) == source
    x = torch.randn(2, 4)
    assert torch.equal(torch.jit.script(net)(x), net(x))
    assert torch.equal(torch.fx.symbolic_trace(net)(x), net(x))
    assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))
    assert torch.equal(torch.compile(net, backend="eager")(x), net(x))
    assert torch.equal(torch.compile(net.features, backend="eager")(x), net.features(x))
    assert torch.equal(pickle.loads(pickle.dumps(net)).features(x), net.features(x))
    assert torch.equal(pickle.loads(pickle.dumps(net.features))(x), net.features(x))


def test_what_a_function_drops_after_a_call_is_freed(watched: Watched) -> None:
    def program(rows: int) -> bool:
        x = torch.ones(rows, 4)
        dropped = weakref.ref(x)
        Policy().features(x)
        del x
        return dropped() is None

    assert program(2)


def test_methods_of_bases(watched: Watched) -> None:
    net = Derived()
    bare = train(copy.deepcopy(net), evaluates)
    assert train(net, evaluates) == bare
    assert is_watched(Derived, "evaluate")
    assert not is_watched(Policy, "evaluate")
    assert [turn.forwards for turn in watched.closed][-1] == 1


def test_methods_are_found_after_rollouts(tmp_path: Path) -> None:
    """Thousands of calls without gradients come before the first update."""
    host = host_in(tmp_path)
    host.hooks.install(live=True)
    try:
        net = Policy()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.no_grad():
            for _ in range(50):
                net(torch.ones(1, 4))
        host.hooks.read()
        assert host.hooks.root_search.is_active
        for _ in range(6):
            loss = losses_of(evaluates(net, torch.randn(6, 4)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            host.hooks.read()
        assert is_watched(Policy, "evaluate")
        assert not host.hooks.root_search.is_active
    finally:
        host.hooks.remove()


def test_calls_without_gradients_do_not_decide_about_a_method(watched: Watched) -> None:
    net = Policy()
    with torch.no_grad():
        for _ in range(5):
            net.features(torch.ones(2, 4))
    train(net, FORWARD_PASSES["features"])
    assert is_watched(Policy, "features")


def test_a_method_that_is_only_called_without_gradients_is_none(watched: Watched) -> None:
    net = Policy()
    with torch.no_grad():
        for _ in range(100):
            net.features(torch.ones(2, 4))
    assert not is_watched(Policy, "features")


def test_an_exception_of_a_method_is_the_programs(watched: Watched) -> None:
    net = Policy()
    train(net, FORWARD_PASSES["features"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net.features(torch.ones(2, 5))
    assert [turn.forwards for turn in watched.closed][-1] == 1


def test_classes_are_freed(watched: Watched) -> None:
    def make() -> weakref.ref[type]:
        class Own(Policy):
            def features(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * self.body(x)

        train(Own(), FORWARD_PASSES["features"])
        assert is_watched(Own, "features")
        return weakref.ref(Own)

    reference = make()
    gc.collect()
    assert reference() is None
