"""The optimizers: against torch in float64, their checkpoints, and what is left to torch."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatout import kernels, knobs, optim
from flatout.agent.session import Session
from flatout.optim import functional
from flatout.record import read_run
from flatout.request import RUN_VARIABLE, Request

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


def one_pass(on_failure: Callable[[Exception], None]) -> functional.User:
    return functional.User(functional.OnePass(kernels.load("optimizers")), on_failure)


@pytest.fixture
def stand_ins() -> Iterator[list[Exception]]:
    """All of them in place, as the knob does it; yields what failed."""
    failures: list[Exception] = []
    undo, missing = functional.turn(one_pass(failures.append))
    assert not missing
    yield failures
    undo()


def refused(*args: Any) -> None:
    raise AssertionError("torch's own step was asked for")


@pytest.fixture
def nothing_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, stand_ins: list[Exception]
) -> list[Exception]:
    monkeypatch.setattr(functional, "_leave_rest", refused)
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


def test_versions_count_up(nothing_left_to_torch: list[Exception]) -> None:
    """Autograd finds out that a tensor it needs has been stepped."""
    param = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([param])
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    optimizer.step()
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
    undo, _ = functional.turn(one_pass(failures.append))
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
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("OPTIMIZER", optimizer)],
        env={**os.environ, RUN_VARIABLE: str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    process = read_run(folder).main
    assert process is not None
    return [float(line) for line in completed.stdout.split()], process.events


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "Rprop"])
def test_the_knob_on_a_program(tmp_path: Path, optimizer: str) -> None:
    bare, _ = losses(tmp_path, optimizer, {})
    mine, events = losses(tmp_path, optimizer, {"optimizer": "onepass"})
    assert mine == pytest.approx(bare, rel=1e-4)
    assert (mine == bare) == (optimizer == "Rprop")  # that it has no kernel for
    assert [(e.what, e.subject) for e in events] == [("applied", "optimizer")]


def test_the_knob_is_undone_and_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.optim import rmsprop

    session, knob = Session(Request(), tmp_path), knobs.get("optimizer")
    monkeypatch.setattr(functional, "_kept", set())  # as where no test has used the library
    undo = knob.apply(session, "onepass")
    assert rmsprop._single_tensor_rmsprop is not torchs(rmsprop._single_tensor_rmsprop)
    undo()
    assert rmsprop._single_tensor_rmsprop is torchs(rmsprop._single_tensor_rmsprop)
    facts = knobs.Facts("cpu")
    assert knob.offer(facts).settings == ("onepass", "fused")

    def unavailable(name: str) -> None:
        raise kernels.KernelError("there is no C compiler")

    monkeypatch.setattr(kernels, "load", unavailable)
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    with pytest.raises(knobs.RefusedError, match="no C compiler"):
        knob.apply(session, "onepass")
    assert knob.offer(facts).settings == ("fused",)
