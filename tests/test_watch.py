"""The watches themselves: what a program can see of them, which is to be nothing."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flatout.intercept import _watch
from flatout.intercept.hooks import Hooks
from flatout.wire.turns import Turn, Turns

torch = pytest.importorskip("torch")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x: Any, fail: bool = False) -> Any:
        if fail:
            raise ValueError("from forward")
        return self.linear(x)


class Watched:
    def __init__(self, live: bool) -> None:
        self.closed: list[Turn] = []
        self.failures: list[BaseException] = []
        self.hooks = Hooks(
            lambda optimizer_exists: Turns(self.closed.append, optimizer_exists),
            on_readable=lambda: self.hooks.read(),
            start_loss_copy=lambda loss: None,
            on_skip=lambda subject, why: pytest.fail(why),
            on_failure=lambda subject, error: self.failures.append(error),
            on_callback_failure=lambda callback, error: self.failures.append(error),
        )
        self.hooks.install(live)


@pytest.fixture(params=[True, False], ids=["live", "batched"])
def watched(request: pytest.FixtureRequest) -> Iterator[Watched]:
    watched = Watched(request.param)
    yield watched
    watched.hooks.remove()
    assert not watched.failures


def train(net: Any, steps: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(steps):
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()


def formatted(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError):
        return traceback.format_exc()
    pytest.fail("it did not raise")


class BrokenData(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        raise ValueError("from the dataset")


FAILURES = {
    "forward": lambda net: net(torch.ones(1, 4), fail=True),
    "shapes": lambda net: net(torch.ones(1, 5)),
    "backward": lambda net: torch.ones(1).backward(),
    "grad": lambda net: torch.autograd.grad(torch.ones(1), torch.ones(1)),
    "loader": lambda net: list(torch.utils.data.DataLoader(BrokenData())),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_tracebacks_read_as_without(failure: str) -> None:
    bare_net = Net()
    bare = formatted(lambda: FAILURES[failure](bare_net))
    watched = Watched(live=False)
    try:
        net = Net()
        train(net, 1)
        seen = formatted(lambda: FAILURES[failure](net))
    finally:
        watched.hooks.remove()
    assert _frames(seen) == _frames(bare)
    assert seen.splitlines()[-1] == bare.splitlines()[-1]


def _frames(text: str) -> list[str]:
    """File, line and function of each frame but those of this test, which differ by line."""
    return [
        line for line in text.splitlines() if line.startswith("  File ") and __file__ not in line
    ]


def test_a_model_saved_copied_or_pickled_has_nothing_of_ours(watched: Watched) -> None:
    net = Net()
    train(net, 2)
    assert b"flatout" not in pickle.dumps(net.linear)
    clone = copy.deepcopy(net)
    assert not any("flatout" in type(value).__module__ for value in vars(clone).values())
    assert "flatout" not in repr(vars(net))


def test_pickled_by_value_a_watch_is_the_original(watched: Watched) -> None:
    train(Net(), 1)
    watch = vars(Net)["__call__"]
    assert isinstance(watch, _watch.Watch)
    assert pickle.loads(pickle.dumps(watch)) is torch.nn.Module.__call__


def test_seen_from_the_class_there_is_no_watch(watched: Watched) -> None:
    train(Net(), 1)
    assert Net.__call__ is torch.nn.Module.__call__
    assert "__call__" not in vars(torch.nn.Module) or not isinstance(
        vars(torch.nn.Module)["__call__"], _watch.Watch
    )
    assert not inspect.signature(Net).parameters
    assert inspect.signature(torch.nn.Module.__call__) == inspect.signature(Net.__call__)


def test_removed_everything_is_as_before() -> None:
    before = [
        vars(torch.utils.data.DataLoader)["__iter__"],
        vars(torch.nn.Module).get("__setstate__"),
        vars(torch.optim.Optimizer)["__init__"],
        torch.autograd._engine_run_backward,
    ]
    watched = Watched(live=False)
    train(Net(), 2)
    watched.hooks.read()
    watched.hooks.remove()
    assert "__call__" not in vars(Net)
    assert "__call__" not in vars(torch.nn.Linear)
    assert before == [
        vars(torch.utils.data.DataLoader)["__iter__"],
        vars(torch.nn.Module).get("__setstate__"),
        vars(torch.optim.Optimizer)["__init__"],
        torch.autograd._engine_run_backward,
    ]
    assert [turn.updates for turn in watched.closed] == [1, 1]


def test_two_watched_classes_of_one_line_note_a_call_once(watched: Watched) -> None:
    class Child(Net):
        pass

    train(Net(), 1)
    train(Child(), 3)
    watched.hooks.read()
    assert [turn.forwards for turn in watched.closed] == [1] * 4


def test_a_forward_wrapper_gets_the_call_and_gives_the_result(watched: Watched) -> None:
    def doubled(call: Any, module: Any, args: Any, kwargs: Any) -> Any:
        return 2 * call(module, *args, **kwargs)

    net = Net()
    x = torch.ones(1, 4)
    expected = 2 * net(x)
    watched.hooks.callbacks.forward_wrappers.append(doubled)
    assert torch.equal(net(x), expected)
    watched.hooks.callbacks.forward_wrappers.remove(doubled)
    assert torch.equal(net(x), expected / 2)


def test_losses_are_those_that_backward_started_from(watched: Watched) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    expected = []
    for _ in range(3):
        loss = net(torch.ones(1, 4)).sum()
        expected.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, net.linear.bias, retain_graph=True)
        assert gradient.sum() == 2
        loss.backward(retain_graph=True)
        torch.stack([loss, loss]).backward(torch.ones(2))  # no single scalar
        optimizer.step()
    watched.hooks.read()
    assert [turn.losses for turn in watched.closed] == [[loss] for loss in expected]
    assert [turn.backwards for turn in watched.closed] == [3] * 3


LOSSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda x: x.sum(),
    "float64": lambda x: x.double().sum() / 3,
    "bfloat16": lambda x: x.bfloat16().sum(),
    "one element": lambda x: x.sum().reshape(1),
    "view": lambda x: x.cumsum(0)[1],
    "lazily negated view": lambda x: torch.complex(x, x).conj().imag[1],
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "item"])
def test_losses_of_every_kind_are_what_item_gives(
    kind: str, exchange: bool, watched: Watched
) -> None:
    if not exchange:
        assert not watched.hooks._log.set_exchange_api(None)  # torch before 2.10
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    loss = LOSSES[kind](net(torch.ones(1, 4))[0])
    loss.backward()
    optimizer.step()
    net(torch.ones(1, 4))
    watched.hooks.read()
    (turn,) = watched.closed
    assert turn.losses == [loss.item()]


def test_a_complex_loss_is_not_kept(watched: Watched) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    loss = torch.complex(net(torch.ones(1, 4)), torch.ones(1, 2)).sum()
    loss.backward(torch.ones((), dtype=loss.dtype))
    optimizer.step()
    net(torch.ones(1, 4))
    watched.hooks.read()
    assert [turn.losses for turn in watched.closed] == [[]]


def test_another_thread_does_not_spoil_the_turns(watched: Watched) -> None:
    net, other = Net(), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.ones(1, 4)).sum().backward()
        thread = threading.Thread(target=lambda: other(torch.ones(1, 4)).sum().backward())
        thread.start()
        thread.join()
        optimizer.step()
    watched.hooks.read()
    assert [(t.forwards, t.backwards, t.updates) for t in watched.closed] == [(1, 1, 1)] * 3


def test_backward_passes_of_tracing_are_not_the_programs(watched: Watched) -> None:
    """``torch.compile`` traces a backward pass, by calling it, in the first forward pass."""
    net = Net()
    compiled = torch.compile(net, backend="aot_eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        compiled(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    watched.hooks.read()
    assert [(t.forwards, t.backwards, t.updates) for t in watched.closed] == [(1, 1, 1)] * 3
    assert all(phase >= 0 for turn in watched.closed for phase in turn.phases_ns)


def test_the_next_thread_is_watched_once_the_watched_one_has_ended(watched: Watched) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def train() -> None:
        for _ in range(2):
            net(torch.ones(1, 4)).sum().backward()
            optimizer.step()

    for _ in range(3):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    train()
    watched.hooks.read()
    assert [(t.forwards, t.backwards, t.updates) for t in watched.closed] == [(1, 1, 1)] * 8


def test_a_signal_during_a_watched_call_reaches_the_program(watched: Watched) -> None:
    import signal

    class Interrupting(Net):
        def forward(self, x: Any, fail: bool = False) -> Any:
            signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt):
        Interrupting()(torch.ones(1, 4))


def test_a_class_made_at_run_time_is_freed_with_its_watch(watched: Watched) -> None:
    def made() -> tuple[weakref.ref[Any], ...]:
        held = torch.zeros(3)

        class Closing(Net):
            def __call__(self, *args: Any) -> Any:  # what the watch stands for holds the class
                return super().__call__(*args) + held.sum()

        class Child(Closing):
            pass

        train(Closing(), 2)
        train(Child(), 2)
        assert all(isinstance(vars(c)["__call__"], _watch.Watch) for c in (Closing, Child))
        return weakref.ref(Closing), weakref.ref(Child), weakref.ref(held)

    references = [reference for _ in range(3) for reference in made()]
    gc.collect()
    assert [reference() for reference in references] == [None] * 9


def test_watches_neither_leak_nor_lose_references(watched: Watched) -> None:
    import sys

    def round_trip() -> None:
        net = Net()
        train(net, 2)
        watch = vars(Net)["__call__"]
        pickle.loads(pickle.dumps(watch))
        assert watch.original is None
        assert repr(watch) == repr(torch.nn.Module.__call__)
        with pytest.raises(ValueError, match="from forward"):
            net(torch.ones(1, 4), fail=True)

    round_trip()
    watch = vars(Net)["__call__"]
    subjects = [watch, Net, torch.nn.Module.__call__, type(watch), watched.hooks._log, None]
    gc.collect()
    before = [sys.getrefcount(subject) for subject in subjects[:5]]
    for _ in range(20):
        round_trip()
    gc.collect()
    after = [sys.getrefcount(subject) for subject in subjects[:5]]
    assert max(abs(a - b) for a, b in zip(after, before, strict=True)) < 5


def test_a_call_reaches_what_it_would_reach_without_a_watch(watched: Watched) -> None:
    class Left(Net):
        pass

    class Right(Net):
        def __call__(self, *args: Any) -> Any:
            return "right"

    class Diamond(Left, Right):
        pass

    train(Left(), 1)  # the watch on it was made where nothing lies between it and Net
    assert Diamond()(torch.ones(1, 4)) == "right"
    assert Diamond.__call__ is Right.__call__
    net = Left()
    original = torch.nn.Module.__call__
    try:
        Net.__call__ = lambda self, x: "from the base"
        assert net(torch.ones(1, 4)) == "from the base"
    finally:
        del Net.__call__
    assert torch.is_tensor(net(torch.ones(1, 4)))
    assert Left.__call__ is original


def test_only_torchs_own_initialize_gets_the_original(watched: Watched) -> None:
    """A program may have a function of that name, which looks up what it calls."""
    net = Net()
    train(net, 1)

    def _initialize(module: Any) -> Any:
        return module.__call__

    assert isinstance(_initialize(net).__func__, _watch.Watch)
    compiled = torch.compile(net, backend="eager")
    assert compiled.forward._torchdynamo_orig_callable.__func__ is torch.nn.Module.__call__


def test_what_is_no_method_is_left_where_it_is() -> None:
    skipped: list[str] = []
    watched = Watched(live=False)
    watched.hooks.root_search._on_skip = lambda subject, why: skipped.append(subject)

    class Static(Net):
        @staticmethod
        def __call__(x: Any) -> Any:
            return x + 1

    class Computed(Net):
        @property
        def __call__(self) -> Any:  # type: ignore[override]
            return lambda x: x + 2

    class Callable_(Net):  # noqa: N801
        __call__ = types.SimpleNamespace()  # not callable at all

    try:
        assert [kind()(1) for kind in (Static, Computed)] == [2, 3]
        with pytest.raises(TypeError, match="not callable"):
            Callable_()(1)
    finally:
        watched.hooks.remove()
    assert len(skipped) == 3
    assert isinstance(vars(Static)["__call__"], staticmethod)


def test_a_module_that_makes_its_layers_in_its_first_call_is_a_root(watched: Watched) -> None:
    class Late(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            if "linear" not in self._modules:
                self.linear = torch.nn.Linear(4, 2)
            return self.linear(x)

    net = Late()
    net(torch.ones(1, 4))
    train(net, 3)
    assert any(root is net for root in watched.hooks.root_search.roots)
    watched.hooks.read()
    assert [turn.forwards for turn in watched.closed][-1] == 1


def test_roots_are_forgotten_with_the_modules(watched: Watched) -> None:
    for _ in range(20):
        torch.nn.Sequential()(torch.ones(1))  # no root: it has no parameters
        train(Net(), 1)
    gc.collect()
    assert watched.hooks.root_search.roots == []
    assert not watched.hooks._log.roots
