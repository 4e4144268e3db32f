"""When a knob that has failed is undone, and that nothing applied by half stays."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatout.agent.imported_files import imported_files
from flatout.agent.tensors import to_floats, to_ints
from flatout.intercept import dispatch, handled_calls
from flatout.intercept.applied import AppliedSettings
from flatout.intercept.callbacks import CallbackList
from flatout.intercept.events import EventLog
from flatout.intercept.patch import Undo
from flatout.wire.turns import Turn
from flatout.wire.writer import RecordWriter
from tests.hosts import host_in


class Knobs:
    """Knobs that note what is undone; steps are followed already, or only since a failure."""

    def __init__(self, folder: Path, begins_now: bool = False) -> None:
        self.undone: list[str] = []
        events = EventLog(RecordWriter(folder, 1))
        self.applied = AppliedSettings(self.apply, events, lambda: begins_now)
        for name in ("a", "b"):
            self.applied.apply(name, "on")

    def apply(self, name: str, setting: str) -> Undo:
        return lambda: self.undo(name)

    def undo(self, name: str) -> None:
        self.undone.append(name)


def step(end_ns: int) -> Turn:
    closed = Turn(0)
    closed.end_ns = end_ns
    return closed


def test_a_boundary_before_the_failure_undoes_nothing(tmp_path: Path) -> None:
    """Events of steps are read late: such a boundary lies in the past."""
    knobs = Knobs(tmp_path)
    knobs.applied.withdraw("a", ValueError("it failed"))
    failed_ns = knobs.applied._withdrawn_ns
    knobs.applied.undo_withdrawn(step(failed_ns - 1))
    assert not knobs.undone
    assert knobs.applied.has_withdrawn
    knobs.applied.undo_withdrawn(step(failed_ns + 1))
    assert knobs.undone == ["a"]
    assert not knobs.applied.has_withdrawn


def test_the_first_of_the_steps_that_are_followed_since_then_may_be_a_part(tmp_path: Path) -> None:
    """Such as the half of an iteration that ends with the first of two optimizers."""
    knobs = Knobs(tmp_path, begins_now=True)
    knobs.applied.withdraw("a", ValueError("it failed"))
    later_ns = knobs.applied._withdrawn_ns + 1
    knobs.applied.undo_withdrawn(step(later_ns))
    assert not knobs.undone
    knobs.applied.undo_withdrawn(step(later_ns))
    assert knobs.undone == ["a"]


def test_a_knob_may_fail_while_another_is_undone(tmp_path: Path) -> None:
    knobs = Knobs(tmp_path)

    def undo(name: str) -> None:
        knobs.undone.append(name)
        knobs.applied.withdraw("b", ValueError("it failed as well"))

    knobs.undo = undo  # type: ignore[method-assign]
    knobs.applied.withdraw("a", ValueError("it failed"))
    knobs.applied.undo_withdrawn(step(knobs.applied._withdrawn_ns + 1))
    assert knobs.undone == ["a"]
    assert knobs.applied.has_withdrawn
    knobs.applied.undo_withdrawn(step(knobs.applied._withdrawn_ns + 1))
    assert knobs.undone == ["a", "b"]


def test_where_one_operator_is_refused_the_others_are_as_before() -> None:
    def doubled(below: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    overrides = {"relu": doubled, "no_such_operator": doubled}
    with pytest.raises((RuntimeError, AttributeError, ValueError)):
        dispatch.override_operators(overrides, "CPU", on_failure=pytest.fail)
    assert torch.relu(torch.ones(1)).item() == 1.0
    assert ("relu", "CPU") not in dispatch._overridden


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_counts_as_handled_unless_torch_has_to_make_it(fails: bool) -> None:
    wrong: Any = functools.partial(int, "not a number")
    failures: list[Exception] = []

    def override(below: Any, x: torch.Tensor) -> dispatch.DeferredCall:
        return dispatch.DeferredCall(wrong if fails else below, (x,) if not fails else ())

    dispatch.knob_being_applied = "deferring"
    try:
        undo = dispatch.override_operators({"relu": override}, "CPU", on_failure=failures.append)
    finally:
        dispatch.knob_being_applied = None
    try:
        assert torch.relu(torch.ones(1)).item() == 1.0
    finally:
        undo()
    handled = handled_calls.counts.pop("deferring", 0)
    assert (handled, len(failures)) == ((0, 1) if fails else (1, 0))


def test_whoever_adds_a_callback_is_told_of_its_failure(tmp_path: Path) -> None:
    host = host_in(tmp_path)
    host.hooks.install(live=False)
    failed: list[str] = []

    wrong: Any = functools.partial(int, "not a number")  # fails without a frame of the program

    try:
        host.forward_wrappers.append(wrong, lambda _: failed.append("forward"))
        host.backward_wrappers.append(wrong, lambda _: failed.append("backward"))
        host.before_optimizer_step.append(wrong, lambda _: failed.append("before"))
        host.after_optimizer_step.append(wrong, lambda _: failed.append("after"))
        net = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        net(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    finally:
        for callbacks in (
            *(host.forward_wrappers, host.backward_wrappers),
            *(host.before_optimizer_step, host.after_optimizer_step),
        ):
            callbacks.remove(wrong)
        host.hooks.remove()
    assert failed == ["forward", "backward", "before", "after"]


def test_an_undo_removes_the_callback_that_it_belongs_to_and_no_equal_one() -> None:
    changes: list[int] = []
    callbacks: CallbackList[Callable[[], None]] = CallbackList(lambda: changes.append(1))

    def callback() -> None:
        pass

    undo = callbacks.append(callback)
    callbacks.append(callback)
    undo()
    undo()
    assert len(callbacks) == 1
    assert callback in callbacks
    callbacks.append(callback)
    callbacks.remove(callback)
    assert callback not in callbacks
    assert len(changes) == 6


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_wrapper_that_an_outer_one_removes_is_not_called(tmp_path: Path, kind: str) -> None:
    host = host_in(tmp_path)
    host.hooks.install(live=False)
    called: list[str] = []

    def inner(original: Any, *args: Any) -> Any:
        called.append("inner")
        return original(args[0], *args[1], **args[2])

    def outer_forward(original: Any, module: Any, args: Any, kwargs: Any) -> Any:
        undo()
        return original(module, *args, **kwargs)

    def outer_backward(original: Any, *args: Any, **kwargs: Any) -> Any:
        undo()
        return original(*args, **kwargs)

    try:
        if kind == "forward":
            undo = host.forward_wrappers.append(inner)
            host.forward_wrappers.append(outer_forward)
        else:
            undo = host.backward_wrappers.append(inner)
            host.backward_wrappers.append(outer_backward)
        nn.Linear(2, 1)(torch.ones(1, 2)).sum().backward()
    finally:
        host.hooks.remove()
    assert not called


def test_a_copy_in_host_memory_lives_as_long_as_it_is_read() -> None:
    """A tensor that is not contiguous is copied, and the copy has no other owner."""
    values = torch.arange(2.0 * 2**20).view(2, -1).t()
    whole = values.int()
    for _ in range(5):
        assert to_floats(values)[:4].tolist() == [0.0, 2.0**20, 1.0, 2.0**20 + 1]
        assert to_ints(whole.t()[:, ::2].t())[:2].tolist() == [0, 2**20]


def test_modules_that_torch_generates_are_none_of_the_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.9 writes ``_remote_module_non_scriptable.py`` into a new temporary folder, and
    PyTorch Geometric a file for each convolution, under a new name in each process."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_remote_module_of_a_test", "module_of_a_test", "generated_for_a_test_x7k2"):
        path = tmp_path / f"{name}.py"
        path.write_text("")
        if not name.startswith("generated"):
            os.utime(path, (0, 0))
        __import__(name)
    own = [file for file in imported_files() if file.startswith(str(tmp_path.resolve()))]
    assert [Path(file).name for file in own] == ["module_of_a_test.py"]
