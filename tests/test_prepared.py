"""Optimizer steps made in one call: the same bits, whatever a program changes between steps."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flatout import kernels
from flatout.kernels import extensions
from flatout.optim import functional, prepared
from tests.test_optim import CASES, case_id

pytestmark = pytest.mark.skipif(extensions.missing() is not None, reason="needs a C++ compiler")

STEPS = 12
CHANGE_AT = 6


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return kernels.load("optimizers")


@contextlib.contextmanager
def stepping(library: ctypes.CDLL, is_prepared: bool) -> Iterator[list[str]]:
    """Step with the kernels, each step prepared or not; the list counts the prepared ones."""
    made: list[str] = []

    def fail(error: Exception) -> None:
        raise error

    override = functional.Override(functional.OnePass(library), fail)
    with contextlib.ExitStack() as undo:
        undo.callback(functional.override_all(override)[0])
        if is_prepared:
            native = extensions.load("steps")
            steps = prepared.PreparedSteps(native, 32768, fail, lambda: made.append("step"))
            undo.callback(steps.install())
        yield made


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


class Training:
    """A training whose optimizer a test may change.

    Args:
        make: returns the optimizer of some parameters.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.model = network()
        self.optimizer = make(self.model.parameters())
        self.after_step: Callable[[], None] = lambda: None
        self.step: Callable[[], Any] = lambda: self.optimizer.step()
        self.after_backward: Callable[[], None] = lambda: None

    def go(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            self.optimizer.zero_grad()
            x = torch.randn(4, 3, 8, 8, generator=generator)
            self.model(x).square().mean().backward()
            self.after_backward()
            self.step()
            self.after_step()

    def state(self) -> list[Any]:
        found: list[Any] = [p.detach().clone() for p in self.model.parameters()]
        found += [p._version for p in self.model.parameters()]
        for values in self.optimizer.state.values():
            found += [(key, value) for key, value in values.items()]
        return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_each_optimizer(library: ctypes.CDLL, name: str, options: dict[str, Any]) -> None:
    found = []
    for is_prepared in (False, True):
        training = Training(lambda params: getattr(torch.optim, name)(params, **options))
        with stepping(library, is_prepared) as made:
            training.go(STEPS)
        found.append(training.state())
    assert same(*found)
    assert len(made) >= STEPS - 2  # the second step is the first that reads all of the state


def adam(params: Any) -> Any:
    return torch.optim.Adam(params, lr=0.01, amsgrad=True)


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def replace_parameter(t: Training) -> None:
    torch.manual_seed(3)
    layer = t.model[4]  # type: ignore[index]
    layer.bias = nn.Parameter(torch.randn(5))
    t.optimizer.param_groups[0]["params"][-1] = layer.bias


def share_memory(t: Training) -> None:
    convolution, norm = t.model[0], t.model[1]  # type: ignore[index]
    convolution.bias.data = norm.bias.data


def load_state(t: Training) -> None:
    t.optimizer.load_state_dict(t.optimizer.state_dict())


def replace_state(t: Training) -> None:
    for values in t.optimizer.state.values():
        for key, value in values.items():
            values[key] = value.clone() * 2


def clear_state(t: Training) -> None:
    t.optimizer.state.clear()


def add_group(t: Training, dtype: torch.dtype = torch.float32) -> None:
    torch.manual_seed(4)
    extra = nn.Parameter(torch.randn(5, dtype=dtype))
    t.model.register_parameter("extra", extra)
    t.optimizer.add_param_group({"params": [extra], "lr": 0.5})
    t.after_backward = lambda: setattr(extra, "grad", extra.detach() * 0.1)


def schedule(t: Training) -> None:
    scheduler = torch.optim.lr_scheduler.OneCycleLR(t.optimizer, 0.1, total_steps=100)
    t.after_step = scheduler.step


def transposed_gradient(t: Training) -> None:
    weight = t.model[4].weight  # type: ignore[index]
    t.after_backward = lambda: setattr(weight, "grad", weight.grad.t().contiguous().t())


def gradient_in_parameter(t: Training) -> None:
    weight = t.model[4].weight  # type: ignore[index]
    t.after_backward = lambda: setattr(weight, "grad", weight.data)


def hook(t: Training) -> None:
    def double(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad *= 2

    t.optimizer.register_step_pre_hook(double)


def global_hook(t: Training) -> None:
    def double(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.param_groups[0]["params"][0].grad *= 2

    handle = register_optimizer_step_pre_hook(double)
    t.after_step = handle.remove


def reuse_addresses(t: Training) -> None:
    """Set the learning rate twice: the second lies where the one before the first has lain."""
    group, counter = t.optimizer.param_groups[0], itertools.count(1)

    def change() -> None:
        number = next(counter)
        group["lr"] = 0.001 * number
        group["lr"] = 0.002 * number

    t.after_step = change


CHANGES: dict[str, Callable[[Training], Any]] = {
    "nothing": lambda t: None,
    "learning rate": lambda t: t.optimizer.param_groups[0].update(lr=0.2),
    "learning rate as an integer": lambda t: t.optimizer.param_groups[0].update(lr=1),
    "learning rate as a tensor": lambda t: t.optimizer.param_groups[0].update(lr=torch.tensor(0.2)),
    "weight decay": lambda t: t.optimizer.param_groups[0].update(weight_decay=0.5),
    "maximize": lambda t: t.optimizer.param_groups[0].update(maximize=True),
    "foreach": lambda t: t.optimizer.param_groups[0].update(foreach=True),
    "a scheduler of rate and momentum": schedule,
    "a frozen parameter": lambda t: t.model[0].weight.requires_grad_(False),  # type: ignore[index]
    "a replaced parameter": replace_parameter,
    "other data": lambda t: setattr(
        t.model[0].weight,  # type: ignore[index]
        "data",
        t.model[0].weight.data.clone() * 2,  # type: ignore[index]
    ),
    "another memory format": lambda t: t.model.to(memory_format=torch.channels_last),
    "shared memory": share_memory,
    "a loaded state": load_state,
    "replaced state": replace_state,
    "no state": clear_state,
    "a further group": add_group,
    "a further group in double precision": functools.partial(add_group, dtype=torch.float64),
    "learning rates at one address": reuse_addresses,
    "a gradient of another layout": transposed_gradient,
    "a gradient that is the parameter": gradient_in_parameter,
    "a hook": hook,
    "a hook of all optimizers": global_hook,
    "a closure": lambda t: setattr(t, "step", lambda: t.optimizer.step(lambda: None)),
    "a step counter that is no number": lambda t: (
        [values["step"].fill_(float("nan")) for values in t.optimizer.state.values()]
        if "step" in next(iter(t.optimizer.state.values()))
        else None
    ),
}


@pytest.mark.parametrize("make", [adam, sgd])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_steps(
    library: ctypes.CDLL, change: str, make: Callable[[Any], Any]
) -> None:
    found: list[Any] = []
    for is_prepared in (False, True):
        training = Training(make)
        with stepping(library, is_prepared) as made:
            training.go(CHANGE_AT)
            CHANGES[change](training)
            try:
                training.go(STEPS - CHANGE_AT)
            except RuntimeError as error:
                found.append(str(error))
            else:
                found.append(training.state())
    assert same(*found)
    assert len(made) >= CHANGE_AT - 2


def test_a_profile_shows_the_step_and_a_subclass_steps_itself(library: ctypes.CDLL) -> None:
    class Own(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:  # type: ignore[override]
            asked.append("own")
            return super().step(closure)

    asked: list[str] = []
    with stepping(library, is_prepared=True) as made:
        training = Training(adam)
        training.go(5)
        with torch.profiler.profile() as profile:
            training.go(2)
        assert "Optimizer.step#Adam.step" in {event.key for event in profile.key_averages()}
        own = Training(Own)
        count = len(made)
        own.go(5)
    assert asked == ["own"] * 5
    assert len(made) == count


def test_threads_may_step_one_optimizer(library: ctypes.CDLL) -> None:
    """As with Hogwild. The steps are large, so that other threads run meanwhile."""
    with stepping(library, is_prepared=True):
        parameter = nn.Parameter(torch.zeros(200_000))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.5)
        parameter.grad = torch.zeros(200_000)
        for _ in range(3):
            optimizer.step()
        threads = [
            threading.Thread(target=lambda: [optimizer.step() for _ in range(50)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not parameter.any()


def test_what_an_optimizer_held_is_freed_with_it(library: ctypes.CDLL) -> None:
    with stepping(library, is_prepared=True) as made:
        training = Training(adam)
        training.go(5)
        assert made
        freed = weakref.ref(training.model[0].weight)  # type: ignore[index]
        del training
        gc.collect()
        assert freed() is None


def test_undone_the_class_is_as_it_was(library: ctypes.CDLL) -> None:
    torch.optim.Adam([torch.ones(1)])  # torch wraps the class's step at its first instance
    before = {name: vars(getattr(torch.optim, name)).get("step") for name in prepared._CLASSES}
    with stepping(library, is_prepared=True):
        assert torch.optim.Adam.__dict__["step"] is not before["Adam"]
    hooked = {name: vars(getattr(torch.optim, name)).get("step") for name in prepared._CLASSES}
    assert hooked["Adam"] is before["Adam"]
    with stepping(library, is_prepared=True):
        pass
    assert hooked == {
        name: vars(getattr(torch.optim, name)).get("step") for name in prepared._CLASSES
    }


class OwnParameter(nn.Parameter):
    """A parameter that notices what happens to it."""

    said: list[str] = []

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        cls.said.append(getattr(function, "__qualname__", str(function)))
        return super().__torch_function__(function, types, args, kwargs or {})


class Seen(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.said.append(str(function))
        return function(*args, **(kwargs or {}))


def with_gradients(make: Callable[[Any], nn.Parameter] = nn.Parameter) -> torch.optim.Optimizer:
    weights = [make(torch.ones(3)) for _ in range(3)]
    for weight in weights[:2]:
        weight.grad = torch.ones(3)
    return torch.optim.Adam([{"params": weights[:1]}, {"params": weights[1:]}])


def gradients(optimizer: torch.optim.Optimizer) -> list[torch.Tensor | None]:
    return [p.grad for group in optimizer.param_groups for p in group["params"]]


def test_gradients_are_dropped_as_torch_drops_them(library: ctypes.CDLL) -> None:
    original = torch.optim.Optimizer.zero_grad
    optimizer = with_gradients()
    kept = gradients(optimizer)[0]
    with stepping(library, is_prepared=True):
        optimizer.zero_grad()
        assert gradients(optimizer) == [None] * 3
        assert kept is not None
        assert torch.equal(kept, torch.ones(3))
        optimizer.zero_grad()  # there are none
    assert torch.optim.Optimizer.zero_grad is original


def test_zeros_are_zeros(library: ctypes.CDLL) -> None:
    for how in ((False,), ()):
        optimizer = with_gradients()
        with stepping(library, is_prepared=True):
            optimizer.zero_grad(*how, **({} if how else {"set_to_none": False}))
        first, second, third = gradients(optimizer)
        assert third is None
        for zeros in (first, second):
            assert zeros is not None
            assert torch.equal(zeros, torch.zeros(3))


def test_who_looks_at_gradients_sees_that_they_go(library: ctypes.CDLL) -> None:
    mine = with_gradients(OwnParameter)
    OwnParameter.said.clear()
    plain = with_gradients()
    with stepping(library, is_prepared=True):
        mine.zero_grad()
        assert OwnParameter.said
        with Seen() as seen:
            plain.zero_grad()
        assert seen.said
        with torch.profiler.profile() as profile:
            plain.zero_grad()
    assert gradients(mine) == gradients(plain) == [None] * 3
    assert any("Optimizer.zero_grad#Adam" in event.name for event in profile.events())


def test_the_end_of_a_gradient_may_change_the_optimizer(library: ctypes.CDLL) -> None:
    optimizer = with_gradients()
    gradient = gradients(optimizer)[0]
    weakref.finalize(gradient, optimizer.param_groups.pop)
    del gradient
    with stepping(library, is_prepared=True):
        optimizer.zero_grad()
    assert len(optimizer.param_groups) == 1
    assert gradients(optimizer) == [None]


def test_an_optimizer_of_the_programs_own_drops_its_gradients_itself(library: ctypes.CDLL) -> None:
    class Own(torch.optim.Adam):
        calls = 0

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.calls += 1
            super().zero_grad(set_to_none)

    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = Own([weight])
    with stepping(library, is_prepared=True):
        optimizer.zero_grad()
    assert (optimizer.calls, weight.grad) == (1, None)
