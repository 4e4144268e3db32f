"""Programs that look at functions, or write down what modules do, find torch's own under the knobs
that replace these."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from flatout import knobs
from flatout.intercept.host import Host
from flatout.kernels import find_compiler
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no C compiler")

CASES = (
    *(("memory_format=channels_last", "images"), ("convolution=recast", "images")),
    *(
        ("gradients=on_demand", "images"),
        ("fastpath=off", "encoder"),
        ("attention=fast", "encoder"),
    ),
    *(("attention=fast", "attention"), ("attention=fast", "function")),
    *(("recurrent=fused", "recurrent"), ("random=fast", "wide"), ("elementwise=fast", "wide")),
    ("cross_entropy=fused", "wide"),
)
"""Settings that put another function in the place of one of torch's, or behind an operator, and
the module in whose pass forward that lies."""


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 3, 4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu())  # type: ignore[no-any-return]


class Wide(nn.Module):
    """Operators that are replaced for large tensors only."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        targets = torch.zeros(x.shape[0], dtype=torch.int64)
        wide = self.dropout(F.gelu(torch.tanh(x), approximate="tanh"))
        return F.cross_entropy(wide, targets)


class Attending(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "images": (Images, (2, 3, 8, 8)),
    "encoder": (encoder, (2, 5, 16)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), (2, 5, 16)),
    "function": (Attending, (2, 2, 8, 16)),
    "recurrent": (lambda: nn.GRU(8, 16, batch_first=True), (2, 5, 8)),
    "wide": (Wide, (64, 4100)),
}


def inputs_of(name: str) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(MODULES[name][1])
    return (x, x, x) if name == "attention" else (x,)


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def scripted(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    made = torch.jit.script(module)
    file = io.BytesIO()
    torch.jit.save(made, file)
    file.seek(0)
    return [str(made.graph), first(torch.jit.load(file)(*inputs))]


def traced(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    made = torch.jit.trace(module, inputs, check_trace=False)
    return [re.findall(r"aten::\w+", str(made.inlined_graph)), first(made(*inputs))]


def exported(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    program = torch.export.export(module, inputs, strict=False)
    return [program.graph_module.code, first(program.run_decompositions().module()(*inputs))]


def functionalized(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    made = make_fx(lambda *given: first(module(*given)))(*inputs)
    return [made.code]


def symbolic(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    if isinstance(module, Wide):
        return []  # it asks for a shape
    made = torch.fx.symbolic_trace(nn.Sequential(module) if len(inputs) == 1 else module)
    return [made.code]


def compiled(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    graphs: list[str] = []

    def backend(made: Any, given: Any) -> Any:
        graphs.append(str([n.target for n in made.graph.nodes if n.op != "placeholder"]))
        return made

    torch._dynamo.reset()
    run = torch.compile(module, fullgraph=True, backend=backend)
    run(*inputs)
    return graphs


def copied(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[Any]:
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    others = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    loaded = torch.load(saved, weights_only=False)
    state = dict(vars(module))
    return [sorted(state), *(sorted(vars(other)) for other in (*others, loaded))]


WAYS = (scripted, traced, exported, functionalized, symbolic, compiled, copied)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    yield made
    made.hooks.remove()
    assert not made.applied.failures


def look(name: str, way: Callable[..., list[Any]]) -> list[Any] | str:
    torch.manual_seed(0)
    module, inputs = MODULES[name][0](), inputs_of(name)
    module.train(name not in ("encoder", "attention"))  # which have a fast path in inference
    torch.manual_seed(2)
    try:
        return way(module, inputs)
    except Exception as error:  # noqa: BLE001 - torch does not do all of it
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


@functools.cache
def bare(name: str) -> list[list[Any] | str]:
    return [look(name, way) for way in WAYS]


@pytest.mark.parametrize(("setting", "name"), CASES)
def test_what_is_written_down_is_what_is_written_down_without(
    host: Host, setting: str, name: str
) -> None:
    expected = bare(name)
    knob, _, value = setting.partition("=")
    undo = knobs.get(knob).apply(host, value)
    try:
        found = [look(name, way) for way in WAYS]
    finally:
        undo()
    for way, own, there in zip(WAYS, expected, found, strict=True):
        assert len(there) == len(own), (way, there, own)
        for a, b in zip(there, own, strict=True):
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=str(way))
            else:
                assert a == b, way


LOOKED_AT: tuple[tuple[str, Any, str], ...] = (
    ("memory_format=channels_last", nn.Conv2d, "_conv_forward"),
    ("memory_format=channels_last", nn.ConvTranspose2d, "forward"),
    ("attention=fast", nn.MultiheadAttention, "forward"),
    ("fastpath=off", nn.TransformerEncoderLayer, "forward"),
    ("gradients=on_demand", nn.Module, "zero_grad"),
    ("gradients=on_demand", torch.Tensor, "register_hook"),
    ("gradients=on_demand", torch.amp.GradScaler, "scale"),
    ("gradients=on_demand", torch.optim.Optimizer, "zero_grad"),
    ("zero_grad=none", torch.optim.Optimizer, "zero_grad"),
    ("clipping=onepass", torch.nn.utils.clip_grad, "_get_total_norm"),
)


@pytest.mark.parametrize(("setting", "owner", "name"), LOOKED_AT)
def test_a_function_looks_like_the_one_whose_place_it_takes(
    host: Host, setting: str, owner: Any, name: str
) -> None:
    def see() -> list[Any]:
        function = getattr(owner, name)
        seen = [function.__name__, function.__qualname__, function.__module__, function.__doc__]
        seen += [inspect.signature(function), inspect.getsource(function)]
        seen += [inspect.isfunction(function), pickle.loads(pickle.dumps(function)) is function]
        return seen

    own = getattr(owner, name)
    expected = see()
    knob, _, value = setting.partition("=")
    undo = knobs.get(knob).apply(host, value)
    try:
        assert getattr(owner, name) is not own
        assert see() == expected
    finally:
        undo()
    assert getattr(owner, name) is own
