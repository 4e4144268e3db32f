"""The optimizers: against torch in float64, their checkpoints, and what is left to torch."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forking
import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from flatout import kernels, knobs, optim
from flatout.errors import RefusedError
from flatout.knob import Facts
from flatout.optim import functional
from flatout.wire.record import read_run
from flatout.wire.request import RUN_VARIABLE, Request
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no C compiler")

STEPS = 100

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.05}),
    ("SGD", {"lr": 0.05, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.05, "momentum": 0.9}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    *(
        (name, {"lr": 0.01, **options})
        for name in ("Adam", "AdamW")
        for options in (
            {},
            {"amsgrad": True},
            {"weight_decay": 0.1, "maximize": True},
            {"betas": (0.5, 0.99), "eps": 1e-3, "amsgrad": True, "weight_decay": 0.1},
        )
    ),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RMSprop", {}),
    ("RMSprop", {"centered": True, "weight_decay": 0.1}),
    ("RMSprop", {"momentum": 0.9, "alpha": 0.9, "eps": 1e-3}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "maximize": True}),
    ("Adagrad", {"lr": 0.1}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
    ("Adadelta", {}),
    ("Adadelta", {"rho": 0.5, "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("Adamax", {}),
    ("Adamax", {"betas": (0.5, 0.99), "eps": 1e-3, "weight_decay": 0.1, "maximize": True}),
    ("NAdam", {}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 0.01, "maximize": True}),
    ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"lr": 0.01}),
    ("RAdam", {"lr": 0.01, "weight_decay": 0.1, "maximize": True}),
    ("RAdam", {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]

NAMES = sorted({name for name, _ in CASES})


def case_id(case: object) -> str:
    return case if isinstance(case, str) else ",".join(case) if isinstance(case, dict) else ""


def parameters() -> list[torch.Tensor]:
    """Of every shape and layout that occurs, in float32."""
    torch.manual_seed(0)
    return [
        torch.randn(()),
        torch.randn(0, 3),
        torch.randn(7),
        torch.randn(33, 5),
        torch.randn(40000),
        torch.randn(5, 9).t(),  # dense, not contiguous
        torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.randn(6, 8)[:, ::2],  # with gaps: torch's own steps do it
    ]


def gradient(param: torch.Tensor, step: int, index: int) -> torch.Tensor | None:
    """The same one in any dtype; some parameters have none in some steps."""
    if (step + index) % 7 == 6:
        return None
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(param.shape, generator=generator)
    return (param.detach().double() * 0.3 + noise.double()).to(param.dtype)


def train(
    params: list[torch.Tensor],
    build: Callable[[Any], torch.optim.Optimizer],
    steps: range = range(STEPS),
) -> torch.optim.Optimizer:
    """Two groups, the second with a smaller learning rate that changes on the way."""
    optimizer = build([{"params": params[::2]}, {"params": params[1::2]}])
    optimizer.param_groups[1]["lr"] = 0.5 * optimizer.param_groups[1]["lr"]
    go_on(optimizer, params, steps)
    return optimizer


def go_on(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: range) -> None:
    for step in steps:
        if step == 50:
            optimizer.param_groups[1]["lr"] *= 0.5
        for index, param in enumerate(params):
            grad = gradient(param, step, index)
            if grad is not None:
                grad = torch.empty_like(param).copy_(grad)  # laid out like it
            param.grad = grad
        optimizer.step()


def copies(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    made = []
    for param in parameters():
        own = param.to(dtype) if dtype != param.dtype else param
        made.append(own.requires_grad_())
    return made


def error(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The largest difference, in units of float32's spacing at the size of the parameters."""
    differences = [
        (a.detach().double() - b.detach()).abs().max().item()
        for a, b in zip(ours, exact, strict=True)
        if a.numel()
    ]
    return max(differences) / torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_every_option_against_torch_in_float64(name: str, options: dict[str, Any]) -> None:
    exact, theirs, ours = copies(torch.float64), copies(), copies()
    reference = train(exact, lambda groups: getattr(torch.optim, name)(groups, **options))
    train(theirs, lambda groups: getattr(torch.optim, name)(groups, foreach=False, **options))
    optimizer = train(ours, lambda groups: getattr(optim, name)(groups, **options))
    # Torch's own float32 steps differ from the exact ones by rounding; ours must do no worse, but
    # for the order of operations.
    assert error(ours, exact) <= 3 * error(theirs, exact) + 4
    for index, param in enumerate(ours):
        for key, value in optimizer.state[param].items():
            torch.testing.assert_close(
                value.double(),
                reference.state[exact[index]][key].double(),
                rtol=1e-3,
                atol=1e-4,
                msg=f"{key} of parameter {index}",
            )


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_both_ways(name: str) -> None:
    """Saved after 30 steps by one, loaded and trained on by the other."""
    options = {"momentum": 0.9, "lr": 0.01} if name in ("SGD", "RMSprop") else {}
    theirs_class, ours_class = getattr(torch.optim, name), getattr(optim, name)
    whole = copies()
    train(whole, lambda groups: theirs_class(groups, **options), range(60))
    for first, second in ((ours_class, theirs_class), (theirs_class, ours_class)):
        params = copies()
        saved = train(params, lambda groups, c=first: c(groups, **options), range(30))
        resumed = second([{"params": params[::2]}, {"params": params[1::2]}], **options)
        state = copy.deepcopy(saved.state_dict())
        resumed.load_state_dict(state)
        assert state.keys() == resumed.state_dict().keys()
        assert str(saved.state_dict()["param_groups"]) == str(resumed.state_dict()["param_groups"])
        go_on(resumed, params, range(30, 60))
        for mine, reference in zip(params, whole, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


def test_the_state_is_torchs_own() -> None:
    for name in NAMES:
        params = [copies(), copies()]
        theirs = train(params[0], getattr(torch.optim, name), range(3))
        ours = train(params[1], getattr(optim, name), range(3))
        for mine, reference in zip(params[1], params[0], strict=True):
            state, expected = ours.state[mine], theirs.state[reference]
            assert state.keys() == expected.keys()
            for key, value in expected.items():
                if isinstance(value, torch.Tensor):
                    assert state[key].dtype == value.dtype
                    assert state[key].stride() == value.stride()


def one_pass(on_failure: Callable[[Exception], None]) -> functional.Override:
    return functional.Override(functional.OnePass(kernels.load("optimizers")), on_failure)


@pytest.fixture
def stand_ins() -> Iterator[list[Exception]]:
    """All of them in place, as the knob does it; yields what failed."""
    failures: list[Exception] = []
    undo, missing = functional.override_all(one_pass(failures.append))
    assert not missing
    yield failures
    undo()


def refused(*args: Any) -> None:
    raise AssertionError("torch's own step was asked for")


@pytest.fixture
def nothing_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, stand_ins: list[Exception]
) -> list[Exception]:
    monkeypatch.setattr(functional, "_step_rest", refused)
    return stand_ins


def convolution() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Conv2d(3, 8, 3), torch.randn(4, 3, 6, 6)


FORMATS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "Adam": {"lr": 0.01}, "RMSprop": {}}


@pytest.mark.parametrize("name", FORMATS)
def test_another_memory_format_in_mid_run(name: str, stand_ins: list[Exception]) -> None:
    """Torch's fused steps are silently wrong then: the state keeps its strides."""
    results = []
    for dtype in (torch.float64, torch.float32):
        net, x = convolution()
        net, x = net.to(dtype), x.to(dtype)
        optimizer = getattr(torch.optim, name)(net.parameters(), **FORMATS[name])
        for step in range(20):
            if step == 10:
                net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        results.append([p.detach().double().contiguous() for p in net.parameters()])
    for exact, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
    assert not stand_ins


def test_a_contiguous_checkpoint_in_a_channels_last_model(stand_ins: list[Exception]) -> None:
    results = []
    for dtype in (torch.float64, torch.float32):
        net, x = convolution()
        net, x = net.to(dtype), x.to(dtype)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        net(x).square().mean().backward()
        optimizer.step()
        state = copy.deepcopy(optimizer.state_dict())
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer.load_state_dict(state)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        results.append([p.detach().double().contiguous() for p in net.parameters()])
    for exact, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)
    assert not stand_ins


def test_replaced_data_is_found(nothing_left_to_torch: list[Exception]) -> None:
    param = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([param], lr=1.0)
    for fill in (1.0, 2.0):
        param.data = torch.full((10,), fill)
        param.grad = torch.ones(10)
        optimizer.step()
        assert param.tolist() == [fill - 1.0] * 10


@pytest.mark.parametrize("setting", ["onepass", "fused"])
def test_versions_count_up(tmp_path: Path, setting: str) -> None:
    """Autograd finds out that a tensor it needs has been stepped."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([param])
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    undo = knobs.get("optimizer").apply(host_in(tmp_path), setting)
    optimizer.step()
    undo()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def one_step(param: torch.Tensor, grad: torch.Tensor, name: str, **options: Any) -> torch.Tensor:
    own = param.clone().requires_grad_()
    optimizer = getattr(torch.optim, name)([own], **options)
    own.grad = grad
    optimizer.step()
    optimizer.step()
    return own.detach()


REST: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: one_step(torch.ones(4, 2), torch.eye(4, 2).to_sparse(), "SGD", lr=0.1),
    "complex": lambda: one_step(
        torch.ones(4, dtype=torch.complex64), torch.full((4,), 1 + 2j), "Adam"
    ),
    "float64": lambda: one_step(torch.ones(4).double(), torch.ones(4).double(), "Adam"),
    "bfloat16": lambda: one_step(torch.ones(4).bfloat16(), torch.ones(4).bfloat16(), "Adam"),
    "differentiable": lambda: one_step(torch.ones(4), torch.ones(4), "Adam", lr=0.1),
    "tensor lr": lambda: one_step(torch.ones(4), torch.ones(4), "Adam", lr=torch.tensor(0.1)),
    "expanded": lambda: one_step(torch.ones(4), torch.ones(1).expand(4), "Adam"),
    "foreach": lambda: one_step(torch.ones(4), torch.ones(4), "Adam", foreach=True),
}


@pytest.mark.parametrize("kind", REST)
def test_what_the_kernels_do_not_know_is_torchs(kind: str) -> None:
    expected = REST[kind]()
    failures: list[Exception] = []
    undo, _ = functional.override_all(one_pass(failures.append))
    try:
        result = REST[kind]()
    finally:
        undo()
    assert not failures
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


def test_subclasses_closures_and_clipping(nothing_left_to_torch: list[Exception]) -> None:
    class Mine(torch.optim.Adam):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            type(self).steps += 1
            return super().step(closure)

    def run(optimizer_class: type[torch.optim.Optimizer]) -> torch.Tensor:
        torch.manual_seed(0)
        net, x = nn.Linear(4, 4), torch.randn(8, 4)
        optimizer = optimizer_class(net.parameters(), lr=0.01)  # type: ignore[call-arg]

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = net(x).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            return loss

        for _ in range(5):
            assert optimizer.step(closure) is not None  # type: ignore[arg-type]
        return net.weight.detach()

    torch.testing.assert_close(run(Mine), run(torch.optim.Adam), rtol=0, atol=0)
    assert Mine.steps == 5


def test_the_number_of_threads_changes_nothing(nothing_left_to_torch: list[Exception]) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            params = [nn.Parameter(torch.randn(size)) for size in (100_000, 3, 20_000)]
            optimizer = torch.optim.Adam(params, lr=0.1)
            for step in range(3):
                for param in params:
                    param.grad = torch.sin(param.detach() + step)
                optimizer.step()
            results.append(torch.cat([p.detach() for p in params]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_hooks_fire_once_and_schedulers_work() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([param], lr=0.1)
    torch.optim.Adam([nn.Parameter(torch.ones(1))])  # torch decorates its own class now
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    schedule.step()
    assert seen == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.05


def torchs(function: Any) -> Any:
    """Torch's own function where one of ours may have taken its place."""
    return getattr(function, "__wrapped__", function)


def test_a_failure_is_torchs_step_and_is_reported(
    stand_ins: list[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = one_step(torch.ones(4), torch.ones(4), "Adam", fused=False, foreach=False)
    monkeypatch.setattr(functional, "_are_plain", None)
    result = one_step(torch.ones(4), torch.ones(4), "Adam")
    torch.testing.assert_close(result, expected)
    assert [type(failure) for failure in stand_ins] == [TypeError] * 2


# Numbers that are not ordinary


LIMITS = torch.finfo(torch.float32)
SPECIAL = (
    *(0.0, -0.0, 1.0, -0.3, 2.7, 1e-3, torch.inf, -torch.inf, torch.nan, LIMITS.max, -LIMITS.max),
    *(LIMITS.tiny, -LIMITS.tiny, 1e-45, -3e-39, 1e-25, 1e15, -1e15, 1e20, -1e20),
)
VALUES: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, 1e-3, 0.1, 2.0),
    "weight_decay": (0.0, 0.1, 1e-50, 4.0),
    "eps": (0.0, 1e-8, 1e-3),
    "betas": ((0.9, 0.999), (0.0, 0.0), (0.3, 0.5), (0.9, 0.9999999)),
    "momentum": (0.0, 0.9),
    "dampening": (0.0, 1.0),
    "alpha": (0.99, 0.2, 0.0),
    "rho": (0.9, 0.2, 0.0),
    "lr_decay": (0.0, 0.1),
    "momentum_decay": (0.0, 4e-3),
    **dict.fromkeys(("maximize", "nesterov", "amsgrad", "centered"), (False, True)),
    "decoupled_weight_decay": (False, True),
}


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(NAMES))
    known = inspect.signature(getattr(torch.optim, name).__init__).parameters
    taken = {option: v for option, v in VALUES.items() if option in known}
    if name == "AdamW":
        taken.pop("decoupled_weight_decay", None)
    options = {option: draw(st.sampled_from(values)) for option, values in taken.items()}
    if options.get("nesterov"):
        options.update(momentum=0.9, dampening=0.0)
    if options.get("centered") and not options["alpha"]:
        options["alpha"] = 0.99  # else the variance is nothing but a rounding error
    return name, options


def steps(make: Callable[..., Any], seed: int, dtype: torch.dtype) -> list[Any]:
    """Parameters before any step, and with the state after each of a few steps, with special
    values, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(SPECIAL), (4, COUNT), generator=generator)
    start, *gradients = torch.tensor(SPECIAL, dtype=dtype)[drawn]
    param = nn.Parameter(start.clone())
    optimizer = make([param])
    seen = [[start.clone()]]
    for number, grad in enumerate((*gradients, gradients[0])):
        param.grad = grad
        optimizer.step()
        if number == 1:
            with torch.no_grad():
                param.copy_(start)
        state = sorted(optimizer.state[param].items())
        seen.append([param.detach().clone(), *(x.clone() for _, x in state if x is not None)])
    return seen


COUNT = 256
"""Elements that torch's vectorised loops go through without a rest: there a mean with a weight of 1
takes the sign of another zero."""


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
)
@hypothesis.given(case=optimizers(), seed=st.integers(0, 2**32))
def test_special_values_come_out_as_torchs(case: tuple[str, dict[str, Any]], seed: int) -> None:
    name, options = case
    theirs, exact, ours = (
        steps(lambda params, make=make: make(params, **options), seed, dtype)
        for make, dtype in (
            (getattr(torch.optim, name), torch.float32),
            (getattr(torch.optim, name), torch.float64),
            (getattr(optim, name), torch.float32),
        )
    )
    largest = [torch.zeros(tensor.numel()).double() for tensor in theirs[1]]
    for number, (expected, right, found) in enumerate(zip(theirs, exact, ours, strict=True)):
        where = f"{name} {options} step {number} seed {seed}"
        for index, (a, b, c) in enumerate(zip(found, expected, right, strict=True)):
            assert torch.equal(a.isnan(), b.isnan()), where
            assert torch.equal(a[a.isinf()], b[b.isinf()]), where
            assert torch.equal(a.signbit()[a == 0], b.signbit()[a == 0]), where
            ours_off, theirs_off = (
                (x.double() - c).nan_to_num(0.0, 0.0, 0.0).abs() for x in (a, b)
            )
            # What cancels keeps the rounding errors of the numbers that it was.
            largest[index] = largest[index].maximum(b.double().nan_to_num(0.0, 0.0, 0.0).abs())
            assert (ours_off <= 1.01 * theirs_off + 1e-5 * largest[index] + 1e-44).all(), where


def shared(kind: str) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """Parameters and gradients that share memory in one way, and one that shares none."""
    torch.manual_seed(0)
    flat, size = torch.randn(150_000), 90_000
    apart, first, second = torch.randn(size), flat[:size], flat[-size:]
    grads = [torch.randn(size) for _ in range(3)]
    if kind == "whole":
        second = flat[:size]
    elif kind == "a gradient is a parameter":
        first, second = torch.randn(size), torch.randn(size)
        grads[1] = first
    elif kind == "a gradient twice":
        first, second = torch.randn(size), torch.randn(size)
        grads[1] = grads[0]
    elif kind == "its own gradient":
        first, second = torch.randn(size), torch.randn(size)
        grads[0] = first
    return [nn.Parameter(x) for x in (apart, first, second)], grads


@pytest.mark.parametrize(
    "kind",
    ["whole", "in part", "a gradient is a parameter", "a gradient twice", "its own gradient"],
)
@pytest.mark.parametrize("setting", ["onepass", "fused"])
def test_what_shares_memory_is_stepped_one_after_the_other(
    tmp_path: Path, kind: str, setting: str
) -> None:
    results = []
    for is_turned in (False, True):
        host = host_in(tmp_path / str(is_turned))
        undo = knobs.get("optimizer").apply(host, setting) if is_turned else None
        for name in ("SGD", "AdamW", "RMSprop"):
            params, grads = shared(kind)
            options = {"lr": 0.1} if name == "AdamW" else {"lr": 0.1, "momentum": 0.9}
            optimizer = getattr(torch.optim, name)(params, **options)
            for _ in range(3):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
            results.append([param.detach().clone() for param in params])
        if undo is not None:
            undo()
        assert not host.applied.failures
    for bare, mine in zip(results[:3], results[3:], strict=True):
        for expected, found in zip(bare, mine, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_parameter_twice_in_a_group_is_stepped_twice(stand_ins: list[Exception]) -> None:
    param = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.Adagrad([param, param], lr=1.0)
    param.grad = torch.ones(3)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.full((3,), 1 - 1 - 0.5**0.5))
    assert optimizer.state[param]["step"] == 2


def test_the_lazy_sign_of_a_gradient_is_seen(stand_ins: list[Exception]) -> None:
    param = nn.Parameter(torch.zeros(1))
    param.grad = torch.tensor([1.0 + 2.0j]).conj().imag
    assert param.grad.is_neg()
    torch.optim.SGD([param], lr=1.0, weight_decay=0.1).step()
    assert param.item() == 2.0


def test_in_inference_mode(stand_ins: list[Exception]) -> None:
    with torch.inference_mode():
        param, grad = torch.zeros(3), torch.ones(3)
        optimizer = torch.optim.Adagrad([param], lr=1.0)
        param.grad = grad
        optimizer.step()
    assert param.tolist() == pytest.approx([-1.0] * 3)
    assert not stand_ins


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("SGD", "RMSprop")])
@pytest.mark.parametrize("step", [-1.0, -3.0, float("nan"), float("inf"), 2.0**24])
def test_odd_step_counters_do_what_they_do_in_torch(name: str, step: float) -> None:
    outcomes = []
    for make in (getattr(torch.optim, name), getattr(optim, name)):
        param = nn.Parameter(torch.ones(3))
        optimizer = make([param])
        param.grad = torch.full((3,), 0.5)
        optimizer.step()
        optimizer.state[param]["step"].fill_(step)
        try:
            optimizer.step()
        except (ArithmeticError, RuntimeError, TypeError) as error:
            outcomes.append([type(error), str(error)])
        else:
            outcomes.append([])
        outcomes[-1] += [param.nan_to_num(77.0).tolist(), str(optimizer.state[param]["step"])]
    assert outcomes[0][:-2] == outcomes[1][:-2]
    assert outcomes[1][-2] == pytest.approx(outcomes[0][-2])
    assert outcomes[0][-1] == outcomes[1][-1]


# The library beside torch's own


def stepped_in_float64() -> float:
    """By torch's own Adam, after whatever was done before."""
    param = nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.Adam([param], lr=0.5)
    param.grad = torch.ones(1, dtype=torch.float64)
    optimizer.step()
    return param.item()


def quadratic(param: nn.Parameter, optimizer: torch.optim.Optimizer) -> Callable[[], torch.Tensor]:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = param.square().sum()
        loss.backward()
        return loss

    return closure


def test_closures_may_step_other_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for sharpness-aware minimisation or problems on two levels."""
    used: list[int] = []
    original = functional.OnePass.step

    def counted(self: Any, form: Any, arguments: Any, options: Any) -> bool:
        used.append(len(arguments["params"]))
        return original(self, form, arguments, options)

    monkeypatch.setattr(functional.OnePass, "step", counted)

    def run(outer: Any, inner: Any) -> list[float]:
        params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
        first, second = outer(params[:1], lr=0.1), inner(params[1:2], lr=0.1)
        third = torch.optim.LBFGS(params[2:], max_iter=2)

        def closure() -> torch.Tensor:
            second.step(quadratic(params[1], second))
            third.step(quadratic(params[2], third))
            return quadratic(params[0], first)()

        for _ in range(3):
            assert torch.is_tensor(first.step(closure))
        return [x for param in params for x in param.tolist()]

    expected = run(torch.optim.AdamW, torch.optim.AdamW)
    assert not used
    for outer, inner, count in (
        (optim.AdamW, optim.AdamW, 6),
        (optim.AdamW, torch.optim.AdamW, 3),  # which is torch's own, also within a step of ours
        (torch.optim.AdamW, optim.AdamW, 3),
    ):
        used.clear()
        assert run(outer, inner) == pytest.approx(expected)
        assert len(used) == count
    assert stepped_in_float64() == pytest.approx(0.5)


def test_a_closure_that_raises_leaves_nothing_behind() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([param], lr=0.1)

    def failing() -> torch.Tensor:
        raise KeyError("mine")

    for _ in range(2):
        with pytest.raises(KeyError, match="mine"):
            optimizer.step(failing)
    assert torch.is_grad_enabled()
    assert functional._override_in_force() is None
    assert stepped_in_float64() == pytest.approx(0.5)
    optimizer.step(quadratic(param, optimizer))
    assert param.tolist() == pytest.approx([0.9] * 3)


def test_threads_may_step_at_once() -> None:
    meet, failures = threading.Barrier(3), []

    def work(make: Any) -> None:
        try:
            param = nn.Parameter(torch.ones(3))
            optimizer = make([param], lr=0.1)

            def closure() -> torch.Tensor:
                meet.wait(60)  # all are inside of a step
                return quadratic(param, optimizer)()

            for _ in range(5):
                optimizer.step(closure)
            results.append(param.tolist())
        except Exception as error:  # noqa: BLE001 - raised in the test
            failures.append(error)

    results: list[list[float]] = []
    makes = (optim.Adam, optim.Adam, torch.optim.Adam)
    threads = [threading.Thread(target=work, args=(make,)) for make in makes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
    assert results[0] == pytest.approx(results[1])
    assert results[0] == pytest.approx(results[2])
    assert stepped_in_float64() == pytest.approx(0.5)


def test_the_library_and_the_knob_at_once(tmp_path: Path) -> None:
    host, knob = host_in(tmp_path), knobs.get("optimizer")
    for setting in ("onepass", "fused"):
        undo = knob.apply(host, setting)
        params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
        for param, make in zip(params, (optim.Adam, torch.optim.Adam), strict=True):
            optimizer = make([param], lr=0.1)
            for _ in range(3):
                optimizer.step(quadratic(param, optimizer))
        torch.testing.assert_close(*params)
        undo()
        assert stepped_in_float64() == pytest.approx(0.5)


def test_copies_subclasses_and_new_groups() -> None:
    class Mine(optim.NAdam):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    def run(make: Any) -> list[str]:
        param = nn.Parameter(torch.ones(3))
        optimizer = make([("weight", param)], lr=0.1)
        optimizer.step(quadratic(param, optimizer))
        more = nn.Parameter(torch.ones(2))
        optimizer.add_param_group({"params": [("more", more)], "lr": 0.5})
        seen = []
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), optimizer):
            assert type(copied) is make
            params = [p for group in copied.param_groups for p in group["params"]]
            for p in params:
                p.grad = torch.full_like(p, 0.5)
            copied.step()
            rounded = [[round(x, 5) for x in p.tolist()] for p in params]
            seen.append(f"{rounded} {copied.state_dict()['param_groups']} {copied}")
        return seen

    globals()["Mine"] = Mine  # for pickle
    Mine.__qualname__ = "Mine"
    expected = run(torch.optim.NAdam)
    assert run(optim.NAdam) == expected
    assert [text.replace("Mine", "NAdam") for text in run(Mine)] == expected


def scripted(function: Any) -> str:
    """How TorchScript compiles it, or why not: some versions of torch cannot script their own."""
    try:
        return str(torch.jit.script(function).graph)
    except RuntimeError as error:
        return str(error)


def test_compiled_and_scripted(stand_ins: list[Exception]) -> None:
    from torch.optim import adam

    results = []
    for make in (optim.AdamW, torch.optim.AdamW):
        param = nn.Parameter(torch.ones(3))
        optimizer = make([param], lr=0.1)
        param.grad = torch.ones(3)
        step = torch.compile(optimizer.step, backend="eager")
        step()
        step()
        results.append(param.detach())
    torch.testing.assert_close(*results)
    expected = scripted(torchs(adam._single_tensor_adam))
    assert scripted(adam._single_tensor_adam) == expected  # as torch.distributed.optim does it


def test_a_function_of_the_programs_own_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch.optim import rmsprop

    calls: list[int] = []

    def mine(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        own(*args, **kwargs)

    own = torchs(rmsprop._single_tensor_rmsprop)
    monkeypatch.setattr(rmsprop, "_single_tensor_rmsprop", mine)
    host = host_in(tmp_path)
    undo = knobs.get("optimizer").apply(host, "onepass")
    for _ in range(2):
        one_step(torch.ones(4), torch.ones(4), "RMSprop")
    undo()
    assert rmsprop._single_tensor_rmsprop is mine
    assert len(calls) == 4


WITHOUT_COMPILER = """
import sys, warnings
import torch
if sys.argv[1] == "flatout":
    from flatout.optim import AdamW, SGD
else:
    from torch.optim import AdamW, SGD
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for make in (AdamW, SGD):
        param = torch.nn.Parameter(torch.linspace(0, 1, 9))
        optimizer = make([param], lr=0.1, weight_decay=0.1)
        for step in range(5):
            param.grad = torch.cos(param.detach() * step)
            optimizer.step()
        print(param.tolist())
print([str(warning.message) for warning in said], file=sys.stderr)
"""


def test_without_a_compiler_the_library_steps_as_torch_does_and_says_so_once(
    tmp_path: Path,
) -> None:
    done = [
        subprocess.run(
            [sys.executable, "-c", WITHOUT_COMPILER, which],
            env={**os.environ, "CC": "/bin/false", "FLATOUT_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        for which in ("torch", "flatout")
    ]
    assert done[1].stdout == done[0].stdout
    assert done[1].stderr.count("flatout.optim steps as torch.optim does: ") == 1
    assert done[1].stderr.count("',") == 0  # one warning


def test_a_kernel_that_lacks_a_function_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(kernels.KernelError, match="has no function sgd"):
        functional.OnePass(kernels.load("finite"))


# The knob


PROGRAM = """
import torch
from flatout.agent import activate
activate()
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.OPTIMIZER(net.parameters(), lr=0.01)
x = torch.randn(64, 8)
for step in range(20):
    loss = net(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
"""


def losses(tmp_path: Path, optimizer: str, settings: dict[str, str]) -> tuple[list[float], Any]:
    folder = tmp_path / "-".join([optimizer, *settings.values()])
    folder.mkdir()
    Request(settings=settings).write(folder)
    script = folder / "program.py"
    script.write_text(PROGRAM.replace("OPTIMIZER", optimizer))
    environment = {**os.environ, RUN_VARIABLE: str(folder), "OMP_NUM_THREADS": "1"}
    completed = forking.run([sys.executable, script], env=environment)
    assert completed.returncode == 0, completed.stderr
    process = read_run(folder).main
    assert process is not None
    return [float(line) for line in completed.stdout.split()], process.events


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "Rprop"])
def test_the_knob_on_a_program(tmp_path: Path, optimizer: str) -> None:
    bare, _ = losses(tmp_path, optimizer, {})
    mine, events = losses(tmp_path, optimizer, {"optimizer": "onepass"})
    assert mine == pytest.approx(bare, rel=1e-4)
    has_kernel = optimizer != "Rprop"
    assert (mine == bare) != has_kernel
    unused = [] if has_kernel else [("unused", "optimizer")]
    assert [(e.what, e.subject) for e in events] == [("applied", "optimizer"), *unused]


def test_the_knob_is_undone_and_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.optim import rmsprop

    host, knob = host_in(tmp_path), knobs.get("optimizer")
    monkeypatch.setattr(functional, "_permanent", set())  # as where no test has used the library
    undo = knob.apply(host, "onepass")
    assert rmsprop._single_tensor_rmsprop is not torchs(rmsprop._single_tensor_rmsprop)
    undo()
    assert rmsprop._single_tensor_rmsprop is torchs(rmsprop._single_tensor_rmsprop)
    facts = Facts("cpu")
    assert knob.offer(facts).settings == ("onepass", "fused")

    def unavailable(name: str) -> None:
        raise kernels.KernelError("there is no C compiler")

    monkeypatch.setattr(kernels, "load", unavailable)
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    with pytest.raises(RefusedError, match="no C compiler"):
        knob.apply(host, "onepass")
    assert knob.offer(facts).settings == ("fused",)
