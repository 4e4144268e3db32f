"""The knob ``replay``: bit by bit what the program computes, whatever changes between the calls."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad as fwAD
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.host import Host
from flatout.kernels import extensions
from flatout.knob import Facts
from flatout.knobs import replay
from flatout.knobs.replay.calls import (
    CAPTURED_AFTER,
    MOST_GRAPHS,
    MOST_MISSES,
    MOST_REPEATED,
    CaptureTimes,
    Replays,
)
from flatout.wire.lines import Captured
from tests.hosts import host_in

STEPS = CAPTURED_AFTER + 4

Call = Callable[..., Any]
"""Calls a module with arguments."""

Scenario = Callable[[Call], list[torch.Tensor]]
"""Does something with modules, through the function that calls them, and returns all results."""

pytestmark = pytest.mark.skipif(extensions.missing() is not None, reason="no C++ compiler")


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    torch._dynamo.reset()
    made = host_in(tmp_path)
    made.hooks.root_search.is_active = False
    handled_calls.counts[replay.NAME] = 0
    yield made
    handled_calls.counts[replay.NAME] = 0


@pytest.fixture(autouse=True)
def no_waiting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured as soon as they are wanted."""
    if "now_s" not in request.fixturenames:
        monkeypatch.setattr("flatout.knobs.replay.calls.PROMPT_GRAPHS", 99)


@pytest.fixture
def said(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(
        host.events, "add", lambda what, subject, why, trace=None: events.append((what, why))
    )
    return events


def replays_of(host: Host) -> tuple[Replays, Call]:
    replays = Replays(host, extensions.load("replay"))

    def call(module: Any, *args: Any, **kwargs: Any) -> Any:
        return replays(lambda m, *a, **k: m(*a, **k), module, args, kwargs)

    return replays, call


def assert_same(host: Host, scenario: Scenario) -> int:
    """Check that a scenario has the same results with the knob; returns how many calls it
    replayed."""
    torch.manual_seed(0)
    expected = scenario(lambda module, *args, **kwargs: module(*args, **kwargs))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    found = scenario(replays_of(host)[1])
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number
    assert torch.equal(torch.get_rng_state(), state)
    return handled_calls.counts[replay.NAME]


class Net(nn.Module):
    """Something of everything: normalisation, dropout, a branch, a shared weight, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.norm, self.layer_norm = nn.BatchNorm1d(8), nn.LayerNorm(8)
        self.drop = nn.Dropout(0.3)
        self.scale = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.relu(self.norm(self.first(x))))
        x = self.second(torch.tanh(self.second(x))) * self.scale
        q, k, v = (part.unsqueeze(0) for part in x.split([2, 3, 3], dim=1)[0].expand(3, -1, -1))
        return self.layer_norm(x) + F.scaled_dot_product_attention(q, k, v)[0].sum()


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]


def train(
    call: Call, net: nn.Module, between: Callable[[int], None] = lambda step: None, rows: int = 5
) -> list[torch.Tensor]:
    """Train for some steps; returns losses, gradients, parameters and buffers of each."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    found = []
    for step in range(2 * STEPS):
        between(step)
        loss = call(net, torch.randn(rows, 6)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        found += [loss.detach(), *gradients(net)]
        optimizer.step()
        found += [value.clone() for value in net.state_dict().values()]
    return found


def test_a_training_is_the_same_bit_by_bit(host: Host, said: list[tuple[str, str]]) -> None:
    assert assert_same(host, lambda call: train(call, Net())) == 2 * STEPS - CAPTURED_AFTER - 1
    assert [what for what, _ in said] == ["noticed"]
    assert "graph 1 of at most 6" in said[0][1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 4)),
        *(lambda p=p: nn.Sequential(nn.Linear(6, 4), nn.Dropout(p)) for p in (0.1, 0.2, 0.7)),
        lambda: nn.TransformerEncoderLayer(6, 2, 8),
        lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 3), nn.MaxPool1d(2)),
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Softmax(1), nn.Flatten()),
    ],
    ids=[
        "mlp",
        *(f"dropout {p}" for p in (0.1, 0.2, 0.7)),
        "transformer",
        "convolution",
        "softmax",
    ],
)
def test_modules_of_torch(host: Host, make: Callable[[], nn.Module]) -> None:
    assert assert_same(host, lambda call: train(call, make()))


def test_a_recurrent_cell(host: Host) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(6, 5), nn.Linear(5, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            state = x.new_zeros(1, 5)
            for row in x:
                state = self.cell(row[None], state)
            return self.head(state)

    assert assert_same(host, lambda call: train(call, Recurrent()))


GLOBAL_SCALE = 1.0


def change(what: str, net: Net) -> Callable[[int], None]:
    """Returns what changes something about a program in the middle of its training."""

    def between(step: int) -> None:
        global GLOBAL_SCALE
        if step != STEPS:
            return
        if what == "attribute":
            net.scale = 0.5
        elif what == "mode":
            net.eval()
        elif what == "part's mode":
            net.drop.eval()
        elif what == "hook":
            net.second.register_forward_hook(lambda m, args, output: output * 2)
        elif what == "backward hook":
            net.second.register_full_backward_hook(lambda m, given, passed: (2 * given[0],))
        elif what == "tensor hook":
            net.first.weight.register_hook(lambda gradient: gradient * 3)
        elif what == "parameter replaced":
            net.first.weight = nn.Parameter(torch.randn(8, 6))
        elif what == "parameter frozen":
            net.first.weight.requires_grad_(False)
        elif what == "data replaced":
            net.first.weight.data = torch.randn(8, 6)
        elif what == "part added":
            net.drop = nn.Sequential(nn.Dropout(0.1), nn.ELU())  # type: ignore[assignment]
        elif what == "buffer":
            net.norm.running_mean.add_(1)
        elif what == "dtype":
            net.double()
        elif what == "method":
            net.forward = lambda x: net.first(x)  # type: ignore[method-assign]
        elif what == "deterministic":
            torch.use_deterministic_algorithms(True)
        elif what == "global":
            GLOBAL_SCALE = 3.0

    return between


@pytest.mark.parametrize(
    "what",
    [
        *("attribute", "mode", "part's mode", "hook", "backward hook", "tensor hook"),
        *("parameter replaced", "parameter frozen", "data replaced", "part added", "buffer"),
        *("method", "deterministic", "global"),
    ],
)
def test_what_changes_between_steps(host: Host, what: str) -> None:
    class Scaled(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * GLOBAL_SCALE

    def scenario(call: Call) -> list[torch.Tensor]:
        global GLOBAL_SCALE
        GLOBAL_SCALE = 1.0
        net = Scaled()
        try:
            return train(call, net, change(what, net))
        finally:
            torch.use_deterministic_algorithms(False)

    assert assert_same(host, scenario) >= STEPS - CAPTURED_AFTER - 1


def test_what_has_changed_is_captured_again(host: Host) -> None:
    net, call = Net(), replays_of(host)[1]
    for train in (True, False):
        net.train(train)
        before = handled_calls.counts[replay.NAME]
        for _ in range(STEPS):
            call(net, torch.randn(5, 6))
        assert handled_calls.counts[replay.NAME] == before + STEPS - CAPTURED_AFTER - 1


def test_shapes_that_change(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net = Net()
        return [found for rows in (5, 7, 5, 3) for found in train(call, net, rows=rows)]

    assert assert_same(host, scenario) > 4 * STEPS


def test_ever_new_shapes_are_given_up(host: Host, said: list[tuple[str, str]]) -> None:
    net, call = Net().eval(), replays_of(host)[1]
    for rows in range(2, 2 + MOST_MISSES + 5):
        x = torch.randn(rows, 6)
        assert torch.equal(call(net, x), net(x))
    assert [what for what, _ in said] == ["skipped"]
    assert "64 of 64 calls had other inputs than those before" in said[0][1]
    assert handled_calls.counts[replay.NAME] == 0


def test_an_evaluation_with_ever_new_shapes_does_not_end_the_replay_of_training(
    host: Host, said: list[tuple[str, str]]
) -> None:
    net, call = Net().eval(), replays_of(host)[1]
    x = torch.randn(2, 6)
    for _ in range(2 * MOST_MISSES):
        call(net, x)
    for rows in range(3, 3 + MOST_MISSES):
        call(net, torch.randn(rows, 6))
    before = handled_calls.counts[replay.NAME]
    call(net, x)
    assert handled_calls.counts[replay.NAME] == before + 1
    assert [what for what, _ in said] == ["noticed"]


def test_the_number_of_graphs_is_limited(host: Host, said: list[tuple[str, str]]) -> None:
    net, call = Net().eval(), replays_of(host)[1]
    for rows in range(2, 2 + MOST_GRAPHS + 3):
        for _ in range(CAPTURED_AFTER + 2):
            x = torch.randn(rows, 6)
            assert torch.equal(call(net, x), net(x))
    assert [what for what, _ in said] == ["noticed"] * MOST_GRAPHS
    assert handled_calls.counts[replay.NAME] == MOST_GRAPHS


def test_calls_without_gradients(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Net(), []
        for step in range(3 * STEPS):
            x = torch.randn(5, 6)
            mode = (torch.enable_grad, torch.no_grad, torch.inference_mode)[step % 3]
            with mode():
                output = call(net, x)
            found.append(output.detach().clone())
            assert output.requires_grad == (step % 3 == 0)
            assert output.is_inference() == (step % 3 == 2)
        return found

    assert assert_same(host, scenario)


def test_gradients_of_inputs_and_of_several_outputs(host: Host) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.value = Net(), nn.Linear(6, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return self.net(x), {"value": self.value(x), "chosen": x.argmax(1)}

    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Two(), []
        for step in range(3 * STEPS):
            x = torch.randn(5, 6, requires_grad=True)
            output, more = call(net, x * 2)
            net.zero_grad()
            parts = [output.sum(), more["value"].square().sum()]
            used = parts[step % 3 :] if step % 3 < 2 else parts[:1]
            sum(used).backward()
            assert x.grad is not None
            assert not more["chosen"].requires_grad
            given = [p.grad is not None for p in net.parameters()]
            found += [output.detach(), x.grad, torch.tensor(given), *gradients(net)]
        return found

    assert assert_same(host, scenario)


class Heads(nn.Module):
    """Several outputs, of which a training may use some."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.first, self.second = Net(), nn.Linear(8, 3), nn.Linear(8, 2)
        self.kept: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shared = self.net(x)
        self.kept = shared.tanh()
        return self.first(shared), self.second(shared).relu(), self.first(self.kept)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (0, 1), (0, 1, 2)])
def test_some_outputs_of_which_gradients_are_asked(
    host: Host, said: list[tuple[str, str]], used: tuple[int, ...]
) -> None:
    """What is recorded for other outputs is not computed, and no parameter gets a gradient more."""
    replays, call = replays_of(host)

    nets: list[Heads] = []

    def scenario(call: Call) -> list[torch.Tensor]:
        nets.append(net := Heads())
        optimizer, found = torch.optim.Adam(net.parameters(), lr=1e-2), []
        for step in range(3 * STEPS):
            outputs = call(net, torch.randn(5, 6))
            wanted = used if step != 2 * STEPS else (0, 1, 2)  # one step is another
            loss = torch.stack([outputs[place].square().mean() for place in wanted]).sum()
            optimizer.zero_grad()
            loss.backward()
            given = [p.grad is not None for p in net.parameters()]
            assert net.kept is not None
            found += [loss.detach(), torch.tensor(given), net.kept.detach(), *gradients(net)]
            replays.look(None)
            optimizer.step()
        return found

    torch.manual_seed(0)
    expected = scenario(lambda module, x: module(x))
    torch.manual_seed(0)
    found = scenario(call)
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number
    assert not any("is left alone" in why for _, why in said)
    (known,) = replays._modules[nets[1]].values()
    assert all(graph.replayed.repetitions <= 1 for graph in known._graphs)


def test_a_gradient_with_other_strides(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.1), nn.Linear(4, 4)), []
        for step in range(2 * STEPS):
            output = call(net, torch.randn(5, 6))
            net.zero_grad()
            if step % 2:
                output.sum().backward()
            else:
                output.backward(torch.randn(4, 5).t())
            found += gradients(net)
        return found

    assert assert_same(host, scenario)


@pytest.mark.parametrize("kind", ["retain_graph", "accumulate", "twice forward", "no backward"])
def test_ways_of_backward(host: Host, kind: str) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Net(), []
        for step in range(2 * STEPS):
            loss = call(net, torch.randn(5, 6)).square().mean()
            if kind == "retain_graph":
                loss.backward(retain_graph=True)
            if kind == "twice forward":
                loss = loss + call(net, torch.randn(5, 6)).abs().mean()
            if kind != "no backward":
                loss.backward()
            found += [loss.detach(), *gradients(net)]
            if kind != "accumulate" or step % 3 == 0:
                net.zero_grad()
        return found

    assert assert_same(host, scenario)


def test_backward_twice_is_an_error(host: Host) -> None:
    net, call = Net(), replays_of(host)[1]
    for _ in range(STEPS):
        loss = call(net, torch.randn(5, 6)).sum()
        loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("what", ["weight", "input"])
def test_writing_what_backward_needs_is_an_error(host: Host, what: str) -> None:
    net, call = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), replays_of(host)[1]
    for step in range(STEPS):
        x = torch.randn(5, 6)
        loss = call(net, x).sum()
        if step == STEPS - 1:
            with torch.no_grad():
                (net[1].weight if what == "weight" else x).add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Sigmoid(), nn.Flatten(0)])
def test_writing_an_output_is_an_error_where_it_is_one_in_torch(
    host: Host, last: nn.Module
) -> None:
    """Torch's backward of ReLU needs its output, that of a view does not."""

    def scenario(call: Call) -> list[str]:
        found, net = [], nn.Sequential(nn.Linear(6, 6), last)
        for _ in range(STEPS):
            output = call(net, torch.randn(5, 6))
            with torch.no_grad():
                output.add_(1)
            try:
                output.sum().backward()
            except RuntimeError as error:
                found.append(str(error)[:40])
            else:
                found.append("computed")
        return found

    assert scenario(replays_of(host)[1]) == scenario(lambda module, x: module(x))


def test_forward_mode_and_transforms_are_as_they_are(host: Host) -> None:
    net, call = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), replays_of(host)[1]
    for _ in range(STEPS):
        call(net, torch.randn(5, 6))
    x, direction = torch.randn(5, 6), torch.randn(5, 6)

    def tangent(run: Call) -> torch.Tensor:
        with fwAD.dual_level():
            return fwAD.unpack_dual(run(net, fwAD.make_dual(x, direction))).tangent

    def transformed(run: Call) -> list[torch.Tensor]:
        return [
            torch.func.vmap(lambda row: run(net, row))(x),
            torch.func.jvp(lambda value: run(net, value), (x,), (direction,))[1],
            torch.func.grad(lambda value: run(net, value).sum())(x),
            torch.func.grad(lambda scale: (scale * run(net, x)).sum())(torch.tensor(2.0)),
        ]

    def own(module: Any, value: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = module(value)
        return result

    assert torch.equal(tangent(call), tangent(own))
    for one, other in zip(transformed(call), transformed(own), strict=True):
        assert torch.equal(one, other)


def test_gradients_of_gradients(host: Host, said: list[tuple[str, str]]) -> None:
    """As a physics-informed network needs them. They are computed by autograd, and soon alone."""

    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), []
        for _ in range(MOST_REPEATED + STEPS):
            x = torch.randn(5, 2, requires_grad=True)
            y = call(net, x)
            (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            (curve,) = torch.autograd.grad(slope[:, 0].sum(), x, create_graph=True)
            loss = (curve[:, 0] + slope[:, 1] * y[:, 0]).square().mean()
            net.zero_grad()
            loss.backward()
            found += [loss.detach().clone(), *gradients(net)]
        return found

    torch.manual_seed(0)
    expected = scenario(lambda module, x: module(x))
    torch.manual_seed(0)
    replays, call = replays_of(host)

    def looking(module: Any, x: torch.Tensor) -> Any:
        replays.look(None)
        return call(module, x)

    for one, other in zip(scenario(looking), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert "gradients of their own" in said[-1][1]


def test_a_gradient_penalty_behind_dropout(host: Host) -> None:
    """What is computed again draws the same random numbers, and moves no generator."""

    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1)), []
        for _ in range(STEPS):
            x = torch.randn(5, 6, requires_grad=True)
            (slope,) = torch.autograd.grad(call(net, x).sum(), x, create_graph=True)
            net.zero_grad()
            slope.square().sum().backward()
            found += [slope.detach(), *gradients(net)]
        return found

    assert assert_same(host, scenario)


class Inside(nn.Module):
    """A module with autocast inside."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(x).float()


@pytest.mark.parametrize("uses_twice", [False, True])
def test_autocast_inside(host: Host, uses_twice: bool) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        once = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 4)]
        return train(call, Inside(Net() if uses_twice else nn.Sequential(*once)))

    assert bool(assert_same(host, scenario)) != uses_twice


class Clamp(torch.autograd.Function):
    """A straight-through estimator: its backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        ctx.save_for_backward(x)
        return x.sign() * scale

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * ctx.scale * (x.abs() < 1), None


@pytest.mark.parametrize("creates_graph", [False, True])
def test_functions_with_a_backward_of_their_own(host: Host, creates_graph: bool) -> None:
    class Binary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(Clamp.apply(self.first(x), 0.5))

    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Binary(), []
        for _ in range(STEPS):
            net.zero_grad()
            loss = call(net, torch.randn(5, 6)).square().sum()
            loss.backward(create_graph=creates_graph)
            found += [loss.detach(), *(one.detach() for one in gradients(net))]
        return found

    assert assert_same(host, scenario)


def test_autocast_outside(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        found, net = [], Net()
        for step in range(3 * STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 0):
                output = call(net, torch.randn(5, 6))
            net.zero_grad()
            output.float().square().sum().backward()
            found += [output.detach().float(), *gradients(net)]
        return found

    assert assert_same(host, scenario) == 0


def test_errors_of_the_program_are_its_own(host: Host) -> None:
    class Checks(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] > 5:
                raise ValueError("too many rows")
            return super().forward(x)

    net, call = Checks(), replays_of(host)[1]
    for _ in range(2 * STEPS):
        call(net, torch.randn(5, 6)).sum().backward()
        with pytest.raises(ValueError, match="too many rows"):
            call(net, torch.randn(6, 6))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            call(net, torch.randn(5, 7))
    assert handled_calls.counts[replay.NAME]


class Reads(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return x if x.sum().item() > 0 else -x


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class Views(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).view(-1), x.t()


class Writes(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.mul_(2)
        return super().forward(x)


@pytest.mark.parametrize("kind", [Reads, Checkpointed])
def test_what_cannot_be_captured_runs_as_it_is(
    host: Host, said: list[tuple[str, str]], kind: type[Net]
) -> None:
    assert assert_same(host, lambda call: train(call, kind())) == 0
    assert [what for what, _ in said] == ["skipped"]
    assert "is left alone: it" in said[0][1]


def test_outputs_that_share_memory(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Views(6, 4), []
        for _ in range(STEPS):
            x = torch.randn(5, 6)
            output, view = call(net, x)
            output.sum().backward()
            x.add_(1)
            found += [output.detach(), view.clone(), *gradients(net)]
        return found

    assert_same(host, scenario)


def test_inputs_that_are_written(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Writes(6, 4), []
        for _ in range(2 * STEPS):
            x = torch.randn(5, 6)
            version = x._version
            output = call(net, x)
            assert x._version == version + 1
            output.sum().backward()
            found += [x, output.detach(), *gradients(net)]
        return found

    assert_same(host, scenario)


def test_modules_are_freed(host: Host) -> None:
    """As those of a cross validation, which trains one after the other."""
    call = replays_of(host)[1]
    references = []
    for _ in range(3):
        net = Net()
        train(call, net)
        references.append(weakref.ref(net))
    del net
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert handled_calls.counts[replay.NAME] > 3 * STEPS


def test_copies_and_undo_leave_no_trace(host: Host) -> None:
    net = Net()
    keys = set(net.__dict__)
    undo = replay.apply(host, "operators")
    assert len(host.forward_wrappers) == 1
    call = replays_of(host)[1]
    for _ in range(STEPS):
        call(net, torch.randn(5, 6))
    assert set(net.__dict__) == keys
    other = copy.deepcopy(net)
    x = torch.randn(5, 6)
    assert torch.equal(other.eval()(x), net.eval()(x))
    undo()
    assert not host.forward_wrappers
    assert not host.before_optimizer_step


def test_it_stays_out_of_ranks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatout.parallel.place.place", lambda: object())
    with pytest.raises(RefusedError, match="with --ranks"):
        replay.apply(host, "operators")


def test_it_is_offered_where_there_is_overhead() -> None:
    assert replay.match(Facts("cpu", overhead_share=0.5, module_share=0.6)).settings
    assert replay.match(Facts("cpu")).settings
    refused = replay.match(Facts("cpu", overhead_share=0.03))
    assert refused.refusal == "Python and dispatch take 3% of a step"
    assert replay.match(Facts("cpu", calls_modules=False)).settings == ()


def test_the_time_of_capturing_is_recorded_and_not_part_of_a_step(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    pauses: list[int] = []
    monkeypatch.setattr(host.record, "write", written.append)
    monkeypatch.setattr(host, "add_pause", pauses.append)
    net, call = Net(), replays_of(host)[1]
    for _ in range(STEPS):
        call(net, torch.randn(5, 6))
    captured = [line.seconds for line in written if isinstance(line, Captured)]
    assert len(captured) == len(pauses) == 1
    assert captured[0] > 0


@pytest.fixture
def now_s(host: Host) -> list[float]:
    """The time by the clock of captures, each of which takes one second."""
    now = [0.0]
    times = host.keep(replay.NAME, "times", lambda: CaptureTimes(lambda: now[0]))
    capturing = times.capturing

    @contextlib.contextmanager
    def take_a_second(form: Any) -> Iterator[None]:
        with capturing(form):
            yield
            now[0] += 1.0

    times.capturing = take_a_second
    return now


def test_one_network_after_another_is_not_captured_again_and_again(
    host: Host, now_s: list[float]
) -> None:
    """As in a cross-validation: each capture has to be a fiftieth of the time at most."""
    call = replays_of(host)[1]

    def count_replayed_networks(networks: int) -> int:
        before = now_s[0]
        for _ in range(networks):
            net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
            for _ in range(STEPS):
                call(net, torch.randn(5, 3))
        return round(now_s[0] - before)

    assert count_replayed_networks(5) == 2
    now_s[0] = 49.0
    assert count_replayed_networks(5) == 0
    now_s[0] = 51.0
    assert count_replayed_networks(5) == 1
    now_s[0] = 90.0
    assert count_replayed_networks(5) == 0
    now_s[0] = 151.0
    assert count_replayed_networks(5) == 2


def test_networks_of_another_form_do_not_wait(host: Host, now_s: list[float]) -> None:
    call = replays_of(host)[1]
    for width in (3, 4, 5, 6, 7):
        net = nn.Sequential(nn.Linear(3, width), nn.Tanh())
        for _ in range(STEPS):
            call(net, torch.randn(5, 3))
    assert now_s[0] == 5.0


def test_networks_that_live_together_do_not_wait(host: Host, now_s: list[float]) -> None:
    """As the critics of SAC and their targets."""
    call = replays_of(host)[1]
    nets = [nn.Linear(3, 4) for _ in range(4)]
    for _ in range(2 * STEPS):
        for net in nets:
            call(net, torch.randn(5, 3)).sum().backward()
            with torch.no_grad():
                call(net, torch.randn(5, 3))
    assert now_s[0] == 8.0


def test_a_network_whose_sizes_are_not_known_yet(host: Host) -> None:
    def scenario(call: Call) -> list[torch.Tensor]:
        net = nn.LazyLinear(4)
        return [call(net, torch.randn(5, 3)).detach() for _ in range(2 * STEPS)]

    assert assert_same(host, scenario) > 0


def test_a_call_that_waits_for_its_capture_is_captured_later(
    host: Host, now_s: list[float], said: list[tuple[str, str]]
) -> None:
    call, net = replays_of(host)[1], nn.Linear(3, 4)
    for rows in (5, 6, 7):
        for _ in range(MOST_MISSES + STEPS):
            call(net, torch.randn(rows, 3))
    assert now_s[0] == 2.0
    now_s[0] = 60.0
    for _ in range(STEPS):
        call(net, torch.randn(7, 3))
    assert now_s[0] == 61.0
    assert not [why for what, why in said if what == "skipped"]


@pytest.mark.parametrize("count", [200, 254, 255, 256, 300, 700])
def test_modules_of_many_parameters(host: Host, count: int) -> None:
    """A call with more than 255 arguments is longer, which CPython 3.11 does not expect."""

    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(torch.randn(16) for _ in range(count))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.stack(list(self.parts)).sum(0)

    def scenario(call: Call) -> list[torch.Tensor]:
        net, found = Many(), []
        for _ in range(40):
            loss = call(net, torch.randn(4, 16)).square().mean()
            loss.backward()
            found += [loss.detach(), *gradients(net)[-3:]]
        return found

    assert assert_same(host, scenario) >= 30
