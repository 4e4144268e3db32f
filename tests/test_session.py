"""The agent's session where a test needs it without a program: forks, captures, its end."""

from __future__ import annotations

import functools
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatout.agent.guard import Guard
from flatout.agent.session import Session
from flatout.agent.switch import Switch
from flatout.intercept import callbacks, hooks, losses
from flatout.wire.record import read_process
from flatout.wire.request import Comparison, GuardRequest, Request
from flatout.wire.turns import Turn


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(hooks, "FLUSH_SECONDS", 0.0)
    session = Session(Request(), tmp_path)
    session.hooks.install(live=False)
    session._guard = Guard(session.host, GuardRequest())
    session._guard.install()
    yield session
    session._guard.remove()
    session.hooks.remove()


def lines(session: Session) -> list[dict[str, Any]]:
    session.record.flush()
    return [json.loads(line) for line in session.record.path.read_text().splitlines()]


class Unread:
    """Stands for a loss with an event of the parent's device."""

    freed = 0

    def __del__(self) -> None:
        Unread.freed += 1


def test_the_child_of_a_fork_releases_nothing_of_the_parents_device(session: Session) -> None:
    """Torch ends a process that releases an event of a device which only its parent uses."""
    assert session._guard is not None
    switch = Switch(session.host, Comparison(arms=({},), block_steps=2, rounds=2))
    switch._unread.append((0, Unread()))
    session._stages.pending = [switch.at_boundary]
    session.hooks.turns._turn = Turn(0)
    session.hooks.turns._turn.losses.append(Unread())
    session.hooks.losses.append(Unread())
    session.hooks._log.losses.append(Unread())
    session._guard._flags.append((Unread(), "gradients were not finite", frozenset()))
    del switch
    child = os.fork()
    if child == 0:
        try:
            session._restart_after_fork()
            session.hooks.read()
            session._guard.finish()
            gc.collect()
            os._exit(Unread.freed)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(session.hooks.losses) == 1
    session.hooks.losses.clear()
    session._guard._flags.clear()
    assert Unread.freed >= 2


def test_nothing_of_ours_gets_into_a_graph_that_the_program_captures(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    done: list[str] = []

    def wrapper(call: Any, module: Any, args: Any, kwargs: Any) -> Any:
        done.append("forward")
        return call(module, *args, **kwargs)

    session.host.forward_wrappers.append(wrapper)
    session.host.before_optimizer_step.append(lambda _: done.append("before"))
    session.host.after_optimizer_step.append(lambda _: done.append("after"))
    monkeypatch.setattr(Guard, "_check_after_backward", lambda _: done.append("backward"))

    def step() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    step()
    assert done == ["forward", "backward", "before", "after"]
    done.clear()
    for module in (callbacks, losses):
        monkeypatch.setattr(module, "is_capturing", lambda: True)
    step()
    assert done == []
    assert losses.start_loss_copy(torch.tensor(1.0)) is None


def test_nothing_is_asked_of_a_device_while_the_program_captures(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question after a loss on its way would end the capture."""
    asked: list[bool] = []
    session._begin_record()
    monkeypatch.setattr(
        "flatout.agent.recorder.arrived_losses", lambda _, wait: asked.append(wait) or []
    )
    monkeypatch.setattr("flatout.agent.session.is_capturing", lambda: True)
    nn.Linear(2, 2)(torch.ones(1, 2)).sum().backward()
    session._read()
    assert asked == []
    monkeypatch.setattr("flatout.agent.session.is_capturing", lambda: False)
    session._read()
    assert asked == [False]


def test_what_cannot_be_read_at_the_end_is_recorded_and_not_raised(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error of the device, nothing can be read from it."""

    session._begin_record()
    monkeypatch.setattr(
        "flatout.agent.recorder.arrived_losses", functools.partial(int, "not a number")
    )
    monkeypatch.setattr(session._stages, "close_profiler", functools.partial(int, "not a number"))
    session.finish("exit")
    *_, end = lines(session)
    unclosed, failed = (line for line in lines(session) if line["kind"] == "event")
    assert (unclosed["what"], unclosed["subject"]) == ("failed", "profile")
    assert (failed["what"], failed["subject"]) == ("failed", "loss")
    assert "Traceback" in failed["traceback"]
    assert end["kind"] == "end"


def test_memory_of_a_device_is_known_without_any_loss(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flatout.agent.recorder.peak_device_bytes", lambda: 2**30)
    session._begin_record()
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for _ in range(4):
            model(torch.ones(1, 2))
    session.finish("exit")
    assert read_process(session.record.path).loop_steps[-1].peak_device_bytes == 2**30


def test_the_time_to_stop_counts_from_the_first_step_on(tmp_path: Path) -> None:
    """Start-up and the first step, which may compile, are not what was asked to be timed."""
    stages = Session(Request(stop_seconds=5.0), tmp_path)._stages
    stopped: list[int] = []
    stages.pending = [stages.time_step, lambda turn: stopped.append(turn.end_ns) is None]
    for at_s in (100, 104, 106):
        turn = Turn(0)
        turn.end_ns = at_s * 10**9
        stages.run(turn)
    assert stopped == [106 * 10**9]
