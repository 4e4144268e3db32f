"""The knob ``compile``: in place, counted, undone, and back to eager when it fails."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flatout import knobs
from flatout.errors import RefusedError
from flatout.intercept.host import Host
from flatout.knob import Facts
from flatout.knobs import compile as knob
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Host:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    made = host_in(tmp_path)
    made.hooks.root_search.is_active = False
    return made


@pytest.fixture
def said(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    events: list[tuple[str, str]] = []
    monkeypatch.setattr(
        host.events, "add", lambda what, subject, why, trace=None: events.append((what, why))
    )
    return events


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
        self.compiling: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def wrapped(
    host: Host, setting: str = "default", **options: Any
) -> tuple[knob.Compiled, Callable[..., Any]]:
    """The wrapper with a backend that takes no time, and a call through it."""
    wrapper = knob.Compiled(host, setting, {"backend": "aot_eager", **options})

    def call(module: Any, *args: Any) -> Any:
        return wrapper(lambda m, *a, **k: m(*a, **k), module, args, {})

    return wrapper, call


def count() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("setting", "graphs"),
    [("default", 1), ("regional", 2)],  # the first block's input needs no gradient
)
def test_compiled_in_place_and_undone(
    host: Host, said: list[tuple[str, str]], setting: str, graphs: int
) -> None:
    net, x = Net(), torch.randn(4, 6)
    expected, keys, before = net(x), list(net.state_dict()), dict(net.__dict__)
    wrapper, call = wrapped(host, setting)
    for _ in range(3):
        torch.testing.assert_close(call(net, x), expected)
    assert count() == graphs
    assert list(net.state_dict()) == keys
    file = io.BytesIO()
    torch.save(net, file)
    assert copy.deepcopy(net)._compiled_call_impl is None
    wrapper.restore()
    assert net.__dict__ == before
    assert all(module._compiled_call_impl is None for module in net.modules())
    assert said[-1] == ("noticed", f"{graphs} graphs compiled, 0 breaks")
    net(torch.randn(5, 6))
    assert count() == graphs


@pytest.mark.parametrize("setting", ["default", "regional"])
def test_modules_of_torch_are_compiled(host: Host, setting: str) -> None:
    """Dynamo passes over frames of torch's files, and ``module.compile()`` starts with one."""
    x = torch.randn(4, 6)
    nets = [
        nn.Sequential(nn.Sequential(*(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))))
        for _ in range(2)
    ]
    wrapper, call = wrapped(host, setting)
    for number, net in enumerate(nets):
        expected = net(x)
        before = count()
        torch.testing.assert_close(call(net, x), expected)
        torch.testing.assert_close(call(net, x), expected)
        assert count() > before, number
    wrapper.restore()
    after = count()
    nets[0](torch.randn(5, 6))
    assert count() == after


def test_recompiles_and_breaks_are_said(host: Host, said: list[tuple[str, str]]) -> None:
    class Breaks(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum().item() > 1e9:
                x = x * 2
            return super().forward(x)

    module = Breaks()
    _, call = wrapped(host)
    call(module, torch.randn(4, 6))
    call(module, torch.randn(5, 6))
    assert [what for what, _ in said] == ["noticed", "noticed"]
    assert "1 breaks" in said[0][1]
    assert int(said[1][1].split()[0]) > int(said[0][1].split()[0])


def test_shapes_that_change_make_one_graph_when_dynamic(host: Host) -> None:
    module = Block()
    _, call = wrapped(host, "dynamic", dynamic=True)
    for rows in (4, 5, 6):
        call(module, torch.randn(rows, 6))
    assert count() == 1


def test_a_module_that_compiles_again_and_again_is_left_to_itself(host: Host) -> None:
    class Doubles(Block):
        def forward(self, x: torch.Tensor, times: int) -> torch.Tensor:
            return super().forward(x) * times

    module, x = Doubles(), torch.randn(4, 6)
    _, call = wrapped(host, dynamic=False)
    for times in range(12):
        torch.testing.assert_close(call(module, x, times), module(x, times))
    assert "had to compile something anew" in host.applied.failures["compile"]
    assert count() == knob.MOST_COMPILING_CALLS
    assert module._compiled_call_impl is None


def test_a_failure_of_the_compiler_is_eager(host: Host) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise OSError("no space left")

    net, x = Net(), torch.randn(4, 6)
    expected = net(x)
    wrapper = knob.Compiled(host, "default", {"backend": broken})
    found = wrapper(lambda m, *a, **k: m(*a, **k), net, (x,), {})
    assert torch.equal(found, expected)
    assert "no space left" in host.applied.failures["compile"]
    assert net._compiled_call_impl is None


def test_errors_are_raised_and_those_of_torch_turn_it_back(
    host: Host, capfd: pytest.CaptureFixture[str]
) -> None:
    class Skipping(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.compiling.append(torch.compiler.is_compiling())
            if len(x) == 3:
                raise LookupError("skipped")
            return super().forward(x)

    _, call = wrapped(host)
    net = Skipping()
    with pytest.raises(LookupError, match="skipped"):
        call(net, torch.randn(3, 6))
    assert not host.applied.failures
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        call(net, torch.randn(4, 7))
    assert "compile" in host.applied.failures
    assert net.compiling == [False, False]
    assert capfd.readouterr().err == ""


def test_nothing_is_compiled_while_classes_are_watched(host: Host) -> None:
    host.hooks.root_search.is_active = True
    net = Net()
    _, call = wrapped(host)
    call(net, torch.randn(4, 6))
    assert net._compiled_call_impl is None
    host.hooks.root_search.is_active = False
    call(net, torch.randn(4, 6))
    assert net._compiled_call_impl is not None


def test_what_the_program_compiles_is_left_alone(host: Host, said: list[tuple[str, str]]) -> None:
    net = Net()
    net.blocks[0].compile(backend="eager")
    own = net.blocks[0]._compiled_call_impl
    wrapper, call = wrapped(host)
    for module in (net, torch.compile(Net(), backend="eager"), torch.jit.script(Block())):
        call(module, torch.randn(4, 6))
    wrapper.restore()
    assert net.blocks[0]._compiled_call_impl is own
    assert net._compiled_call_impl is None
    assert [what for what, _ in said] == ["skipped"] * 3


def test_blocks() -> None:
    net = Net()
    assert knob.blocks(net) == list(net.blocks)
    assert knob.blocks(nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(6, 6))) != []
    assert knob.blocks(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))) == []
    assert knob.blocks(Block()) == []
    nested = nn.ModuleList([nn.Sequential(*(Block() for _ in range(5))) for _ in range(2)])
    assert len(knob.blocks(nn.ModuleDict({"layers": nested}))) == 2


def test_a_module_without_blocks_is_left_alone_by_regional(
    host: Host, said: list[tuple[str, str]]
) -> None:
    _, call = wrapped(host, "regional")
    call(Block(), torch.randn(4, 6))
    assert said == [("skipped", "Block is left alone: it has no blocks of one class in a list")]


def test_where_there_is_nothing_to_compile_with(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    why = "there is no C++ compiler (g++ or clang++)"
    assert knobs.get("compile").offer(Facts("cpu")).refusal == why
    with pytest.raises(RefusedError, match="no C"):
        knobs.get("compile").apply(host, "default")
    with pytest.raises(RefusedError, match="CUDA"):
        knobs.get("compile").apply(host, "reduce-overhead")


def test_outputs_of_cuda_graphs_are_copied(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[None] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(None))
    memory = torch.zeros(3)

    class Replays(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": memory.copy_(x)}

    wrapper = knob.Compiled(host, "reduce-overhead", {"backend": "eager"})
    module = Replays()
    one, two = (
        wrapper(lambda m, *a, **k: memory.copy_(a[0]), module, (torch.full((3,), value),), {})
        for value in (1.0, 2.0)
    )
    assert one.tolist() == [1.0] * 3
    assert two.tolist() == [2.0] * 3
    assert len(marks) == 2
