"""What does nothing for calls without gradients is not in their way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flatout.intercept import dispatch
from flatout.intercept.host import Host
from flatout.intercept.resting import IDLE_CALLS
from flatout.knobs import evaluation
from flatout.knobs.precision.autocast import Autocast
from tests.hosts import host_in

LARGE = 64


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x))


class Program:
    """A watched program that trains, with an override of ``tanh`` for large tensors."""

    def __init__(self, host: Host, may_rest: bool = True) -> None:
        self.host = host
        self.seen: list[int] = []
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.0)
        self.undo = dispatch.override_operators(
            {"tanh": self.tanh}, "CPU", on_failure=pytest.fail, may_rest=may_rest
        )

    def tanh(self, below: Callable[..., Any], x: torch.Tensor) -> torch.Tensor | None:
        self.seen.append(len(x))
        return torch.full_like(x, 7.0) if len(x) >= LARGE else None

    def play(self, calls: int, batch: int = 1) -> torch.Tensor:
        with torch.no_grad():
            for _ in range(calls):
                result = self.net(torch.ones(batch, 4))
        return result

    def update(self, batch: int = LARGE) -> torch.Tensor:
        result = self.net(torch.ones(batch, 4))
        result.sum().backward()
        self.optimizer.step()
        return result


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    host = host_in(tmp_path)
    host.hooks.install(live=True)
    yield host
    host.hooks.remove()


def test_an_override_rests_while_it_handles_nothing(host: Host) -> None:
    program = Program(host)
    program.update()
    expected = program.play(1)
    program.seen.clear()
    assert torch.equal(program.play(1000), expected)
    assert len(program.seen) == IDLE_CALLS
    assert not torch.all(program.play(1, LARGE) == 7.0)  # it rests for all
    program.update()
    assert torch.all(program.update() == 7.0)
    assert torch.all(program.play(1, LARGE) == 7.0)
    program.undo()
    program.play(1)
    program.update()
    assert not host.forward_wrappers
    assert not host.before_optimizer_step


def test_an_override_that_rests_can_be_undone_and_put_under_another(host: Host) -> None:
    program = Program(host)
    program.update()
    program.play(1000)
    before = len(program.seen)
    program.undo()
    program.update()
    assert len(program.seen) == before
    other = Program(host)
    other.play(1000)
    added = dispatch.override_operators(
        {"tanh": lambda below, x: torch.full_like(x, 3.0)}, "CPU", on_failure=pytest.fail
    )
    assert torch.all(other.play(1) == 3.0)
    assert torch.all(other.play(1000) == 3.0)
    added()
    other.undo()
    assert ("tanh", "CPU") not in dispatch._overridden


@pytest.mark.parametrize("may_rest", [False, True])
def test_an_override_that_handles_calls_or_must_act_does_not_rest(
    host: Host, may_rest: bool
) -> None:
    program = Program(host, may_rest)
    for _ in range(8):
        program.play(IDLE_CALLS - 1)
        program.play(1, LARGE if may_rest else 1)
    program.seen.clear()
    program.play(IDLE_CALLS)
    assert len(program.seen) == IDLE_CALLS
    program.undo()


def test_an_override_does_not_rest_in_training(host: Host) -> None:
    program = Program(host)
    for _ in range(2 * IDLE_CALLS):
        program.net(torch.ones(1, 4))
    assert len(program.seen) == 2 * IDLE_CALLS
    program.undo()


def test_without_an_optimizer_nothing_rests(host: Host) -> None:
    program = Program(host)
    host.hooks.optimizer_exists = False
    program.play(1000)
    assert len(program.seen) == 1000
    program.undo()


def calls_of_wrappers(host: Host) -> list[bool]:
    """Whether gradients were on in each call that reaches the wrappers."""
    seen: list[bool] = []
    entry_point = host.hooks._log.wrap_forward
    assert entry_point is not None

    def noted(*args: Any) -> Any:
        seen.append(torch.is_grad_enabled())
        return entry_point(*args)

    host.hooks._log.wrap_forward = noted
    return seen


@pytest.mark.parametrize("with_other", [False, True])
def test_calls_of_a_training_program_without_gradients_pass_by_autocast(
    host: Host, with_other: bool
) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    host.forward_wrappers.append(Autocast(host, "precision", torch.bfloat16))
    with torch.no_grad():
        net(torch.ones(1, 4))
    others: list[bool] = []
    if with_other:

        def other(call: Any, module: Any, args: Any, kwargs: Any) -> Any:
            others.append(torch.is_grad_enabled())
            return call(module, *args, **kwargs)

        host.forward_wrappers.append(other)
    reached = calls_of_wrappers(host)
    with torch.no_grad():
        net(torch.ones(1, 4))
    net(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert reached == ([False, True] if with_other else [True])
    assert others == ([False, True] if with_other else [])


def test_calls_without_gradients_pass_by_the_knob_that_turns_gradients_off(host: Host) -> None:
    net = Net().eval()
    undo = evaluation.apply(host, "no_grad")
    reached = calls_of_wrappers(host)
    with torch.no_grad():
        net(torch.ones(1, 4))
    net(torch.ones(1, 4))
    undo()
    assert reached == [True]
