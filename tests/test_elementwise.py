"""The knob ``elementwise``: tanh, GELU and complex magnitudes by kernels of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from flatout import kernels, knobs
from flatout.intercept import dispatch
from flatout.intercept.patch import Undo
from flatout.knob import Facts
from flatout.knobs import elementwise
from flatout.knobs.elementwise import cpu
from flatout.knobs.memory_format import gradients
from tests.hosts import host_in

pytestmark = pytest.mark.skipif(kernels.find_compiler() is None, reason="there is no compiler")

FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


def raising(error: Exception) -> None:
    raise error


def fast(on_failure: Callable[[Exception], None] = raising) -> Undo:
    return cpu.install(dispatch.load_kernel("elementwise", "torch's own"), on_failure)


@pytest.fixture
def turned() -> Iterator[None]:
    undo = fast()
    yield
    undo()


def results(function: Callable[..., Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and gradient, for outer gradients that bfloat16 can hold."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    made = function(x)
    made.backward((torch.arange(made.numel()).view(made.shape) % 17 / 16).to(made.dtype))
    return made.detach(), x.grad


def values(dtype: torch.dtype) -> torch.Tensor:
    """Of all sizes, both signs."""
    x = torch.logspace(-30, 30, 40_000, base=2.0)
    return torch.stack([x, -x]).to(dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_as_in_float64(turned: None, name: str, dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x = values(dtype)
    ours = results(FUNCTIONS[name], x)
    torch.set_num_threads(before)
    exact = results(FUNCTIONS[name], x.double())
    unit = torch.finfo(dtype).eps
    (value, slope), (right, right_slope) = ours, exact
    units = 16 if name == "gelu" and dtype is torch.float32 else 2
    assert ((value.double() - right).abs() <= units * unit * right.abs() + 1e-11).all()
    assert (
        (slope.double() - right_slope).abs() <= max(units, 4) * unit * (1 + right_slope.abs())
    ).all()


def test_what_is_not_finite_stays_so(turned: None) -> None:
    x = torch.full((cpu.FEWEST,), float("inf"))
    x[1], x[2] = -float("inf"), float("nan")
    assert torch.tanh(x)[:3].nan_to_num(9.0).tolist() == [1.0, -1.0, 9.0]
    found = F.gelu(x, approximate="tanh")
    assert found[0] == float("inf")
    assert found[2].isnan()


def special(dtype: torch.dtype) -> torch.Tensor:
    """Zeros, limits, subnormal numbers, what is not finite, and where something overflows."""
    limits = torch.finfo(dtype)
    sizes = (0.0, limits.max, limits.tiny, limits.tiny / 4, limits.tiny * limits.eps, torch.inf)
    sizes += (1e10, 1e12, 1e14, 1e18, 1e19, 1e20, 1e30, 30.0, 50.0, 87.0, 88.0, 89.0, 104.0, 1e3)
    x = torch.tensor([*sizes, *(-size for size in sizes), torch.nan], dtype=torch.float64)
    return x.to(dtype)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """These values over and over in tensors of different strides."""
    whole = x.repeat(2 * cpu.FEWEST // len(x) + 1)[: 2 * cpu.FEWEST].view(4, 8, 16, -1)
    return {
        "contiguous": whole,
        "transposed": whole.mT,
        "channels last": whole.contiguous(memory_format=torch.channels_last),
        "with gaps": whole[..., ::2],
        "expanded": whole[:1, :1].expand(16, 8, *whole.shape[2:]),
    }


@pytest.mark.parametrize("outer", [1.0, -0.0, 1e-39, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values_come_out_as_torchs(name: str, dtype: torch.dtype, outer: float) -> None:
    def computed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        made = FUNCTIONS[name](x)
        (slope,) = torch.autograd.grad(made, x, torch.full_like(made, outer))
        return made.detach(), slope

    for layout, x in layouts(special(dtype)).items():
        bare = computed(x)
        undo = fast()
        plan = computed(x)
        undo()
        for found, expected in zip(plan, bare, strict=True):
            assert found.stride() == expected.stride(), layout
            unit = torch.finfo(dtype).eps
            torch.testing.assert_close(
                found, expected, rtol=16 * unit, atol=1e-44, equal_nan=True, msg=layout
            )
            is_zero = expected == 0
            assert torch.equal(found.signbit()[is_zero], expected.signbit()[is_zero]), layout


def test_magnitudes_of_special_values(turned: None) -> None:
    x = torch.cat([special(torch.float32), torch.tensor([1.0, -0.3])])
    pairs = torch.cartesian_prod(x, x)
    z = torch.view_as_complex(pairs).repeat(cpu.FEWEST // len(pairs) + 1)
    right = torch.hypot(pairs[:, 0].double(), pairs[:, 1].double())
    right = right.where(~pairs.isinf().any(1), torch.inf).float()
    for part in (z, z.conj(), torch._neg_view(z)):
        found = part.abs()[: len(pairs)]
        torch.testing.assert_close(found, right, rtol=2**-23, atol=0.0, equal_nan=True)


def test_magnitudes(turned: None) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(200, 300, 2, generator=generator) * torch.logspace(-30, 30, 300)[:, None]
    z = torch.view_as_complex(z)
    for part in (z, z.t(), z[:, :200], z.conj()):
        right = part.to(torch.complex128).abs()
        assert ((part.abs().double() - right).abs() <= 2**-23 * right).all()
    z.requires_grad_()
    z.abs().sum().backward()
    assert z.grad is not None


def test_layouts_are_kept(turned: None) -> None:
    x = torch.randn(4, 8, 40, 40).contiguous(memory_format=torch.channels_last).requires_grad_()
    made = F.gelu(x, approximate="tanh")
    assert made.stride() == x.stride()
    gradient = torch.randn(4, 8, 40, 40)
    made.backward(gradient)
    assert x.grad.stride() == x.stride()
    exact = torch.ops.aten.gelu_backward(gradient.double(), x.double(), approximate="tanh")
    assert torch.allclose(x.grad.double(), exact, atol=1e-5)
    wide = torch.randn(400, 200)[:, ::2]
    assert torch.allclose(torch.tanh(wide), torch.tanh(wide.contiguous()))


def test_a_gradient_of_another_shape_is_left_to_torch(turned: None) -> None:
    x = torch.randn(40_000)
    found = torch.ops.aten.gelu_backward(torch.ones(1), x, approximate="tanh")
    assert torch.allclose(
        found, torch.ops.aten.gelu_backward(torch.ones(40_000), x, approximate="tanh"), atol=1e-5
    )


def test_what_it_leaves_to_torch() -> None:
    kinds = (
        torch.randn(100),
        torch.randn(40_000, dtype=torch.float64),
        torch.randn(40_000),
        torch.randn(40_000).half(),
    )
    bare = [(F.gelu(x), x.abs(), torch.tanh(x)) for x in kinds]
    undo = fast()
    plan = [(F.gelu(x), x.abs(), torch.tanh(x)) for x in kinds]
    undo()
    same = [list(map(torch.equal, *two)) for two in zip(bare, plan, strict=True)]
    assert same == [[True] * 3, [True] * 3, [True, True, False], [True] * 3]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_knobs_that_replace_the_same_operator_come_and_go_in_any_order(
    order: tuple[int, int],
) -> None:
    x, gradient = torch.randn(2, 8, 16, 20, 20)
    x = x.contiguous(memory_format=torch.channels_last)
    operator = torch.ops.aten.gelu_backward
    bare = operator(gradient, x, approximate="tanh")
    for first in (0, 1):
        undos = [make() for make in (fast, lambda: gradients.convert_gradients(raising))]
        assert torch.allclose(operator(gradient, x, approximate="tanh"), bare, atol=1e-6)
        undos[order[first]]()
        assert torch.allclose(operator(gradient, x, approximate="tanh"), bare, atol=1e-6)
        undos[order[1 - first]]()
        assert torch.equal(operator(gradient, x, approximate="tanh"), bare)


def test_a_failure_is_told_and_torch_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_in(tmp_path)
    x = torch.randn(40_000)
    bare = torch.tanh(x)
    undo = knobs.get("elementwise").apply(host, "fast")
    monkeypatch.setattr(cpu, "_is_supported", None)
    assert torch.equal(torch.tanh(x), bare)
    undo()
    assert list(host.applied.failures) == ["elementwise"]


def test_it_is_tried_where_there_are_such_functions() -> None:
    assert elementwise.match(Facts("cpu")).settings == ("fast",)
    assert not elementwise.match(Facts("cpu", operators={"aten::mm": 0.5})).settings
    found = Facts("cpu", operators={"aten::abs": 0.1, "aten::mm": 0.5})
    assert elementwise.match(found).share == 0.1
