"""The knob ``convolution``: the same convolutions in another form."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flatout import knobs
from flatout.knob import Facts
from flatout.knobs import convolution
from flatout.knobs.convolution import cpu
from tests.hosts import host_in

LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Kind(NamedTuple):
    """A convolution, the shape of its images, and what of it has another form."""

    module: Callable[..., Any]
    settings: Sequence[int]
    shape: Sequence[int]
    recast: bool = True


KINDS = {
    "first of a generator": Kind(nn.ConvTranspose2d, (8, 6, 7), (5, 8, 1, 1)),
    "last of a generator": Kind(nn.ConvTranspose2d, (8, 1, 4, 2, 1), (5, 8, 14, 14)),
    "doubled": Kind(nn.ConvTranspose2d, (8, 3, 2, 2), (5, 8, 9, 7)),
    "four times": Kind(nn.ConvTranspose2d, (6, 2, 8, 4, 2), (4, 6, 5, 5)),
    "last of a discriminator": Kind(nn.Conv2d, (7, 3, 5), (5, 7, 5, 5)),
    "of one pixel": Kind(nn.Conv2d, (7, 3, 1), (5, 7, 1, 1)),
    "first of a discriminator": Kind(nn.Conv2d, (1, 8, 4, 2, 1), (5, 1, 28, 28)),
    "odd": Kind(nn.ConvTranspose2d, (8, 1, 3, 2, 1), (5, 8, 7, 7), False),
    "with a rest": Kind(nn.ConvTranspose2d, (8, 1, 3, 2, 1, 1), (5, 8, 7, 7), False),
    "many channels": Kind(nn.ConvTranspose2d, (8, 5, 4, 2, 1), (5, 8, 7, 7), False),
    "stride 1": Kind(nn.Conv2d, (3, 8, 3, 1, 1), (5, 3, 16, 16), False),
    "padded": Kind(nn.Conv2d, (3, 8, 4, 1, 1), (5, 3, 4, 4), False),
    "in groups": Kind(nn.ConvTranspose2d, (4, 4, 4, 2, 1, 0, 2), (5, 4, 7, 7), False),
}


def raising(error: Exception) -> None:
    raise error


@pytest.fixture
def recast() -> Iterator[None]:
    undo = cpu.install(raising)
    yield
    undo()


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass had another form."""
    found: list[bool] = []
    for name in ("forward", "backward"):
        own = getattr(cpu, name)

        def noted(*args: Any, own: Any = own) -> Any:
            made = own(*args)
            parts = made if isinstance(made, tuple) else (made,)
            found.append(any(part is not None for part in parts))
            return made

        monkeypatch.setattr(cpu, name, noted)
    return found


def results(module: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of images, weight and bias."""
    module.zero_grad()
    images = images.clone(memory_format=torch.preserve_format).requires_grad_()
    output = module(images)
    generator = torch.Generator().manual_seed(1)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return [output.detach(), images.grad, *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_as_in_float64(
    kind: str, dtype: torch.dtype, layout: torch.memory_format, forms: list[bool]
) -> None:
    torch.manual_seed(0)
    module = KINDS[kind].module(*KINDS[kind].settings).to(dtype)
    images = torch.randn(KINDS[kind].shape).to(dtype).contiguous(memory_format=layout)
    torchs = results(module, images)
    exact = results(copy.deepcopy(module).double(), images.double())
    undo = cpu.install(raising)
    ours = results(module, images)
    undo()
    assert any(forms) == KINDS[kind].recast
    for own, their, right in zip(ours, torchs, exact, strict=True):
        size = right.abs().max()
        error, their_error = ((x.double() - right).abs().max() / size for x in (own, their))
        assert error <= 1.6 * their_error + 2e-6
        assert own.dtype is their.dtype
        for asked in LAYOUTS:
            assert own.is_contiguous(memory_format=asked) == their.is_contiguous(
                memory_format=asked
            )


@pytest.mark.parametrize("layouts", [(x, y) for x in LAYOUTS for y in LAYOUTS])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_are_those_that_torch_foretells(
    kind: str, layouts: tuple[torch.memory_format, torch.memory_format], recast: None
) -> None:
    """A compiled program relies on them, and so does a ``view`` of what comes out."""
    module = KINDS[kind].module(*KINDS[kind].settings).to(memory_format=layouts[1])
    images = torch.randn(KINDS[kind].shape).contiguous(memory_format=layouts[0])
    is_transposed = isinstance(module, nn.ConvTranspose2d)
    settings = (
        *(module.stride, module.padding, module.dilation, is_transposed),
        *(module.output_padding, module.groups),
    )
    weight = module.weight.detach()

    def strides(images: torch.Tensor, weight: torch.Tensor) -> list[Any]:
        operators = torch.ops.aten
        made = operators.convolution(images, weight, None, *settings)
        found = [made]
        for gradient in (made, made.contiguous()):
            found += operators.convolution_backward(
                gradient, images, weight, None, *settings, [True, True, False]
            )[:2]
        return [
            [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
            for x in found
        ]

    with FakeTensorMode() as mode:
        foretold = strides(mode.from_tensor(images), mode.from_tensor(weight))
    if KINDS[kind].recast:
        assert strides(images, weight) == foretold


def test_a_backward_pass_under_autocast_stays_exact(recast: None) -> None:
    module = nn.ConvTranspose2d(64, 6, 7)
    images = torch.randn(50, 64, 1, 1)
    exact = results(module, images)
    images.requires_grad_()
    output = module(images)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        module.zero_grad()
        output.backward(gradient)
    assert torch.equal(module.weight.grad, exact[2])


def test_settings_of_one_number(recast: None) -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(3, 1, 4, 4)
    made = torch.convolution(x, weight, None, [2], [1], [1], True, [0], 1)
    assert torch.allclose(
        made,
        torch.nn.functional.conv_transpose2d(x.double(), weight.double(), None, 2, 1).float(),
        atol=1e-4,
    )


def test_weights_with_their_channels_side_by_side() -> None:
    module = nn.ConvTranspose2d(8, 6, 7).to(memory_format=torch.channels_last)
    images = torch.randn(5, 8, 1, 1)
    torchs = results(module, images)
    undo = cpu.install(raising)
    ours = results(module, images)
    undo()
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert all(map(torch.allclose, ours, torchs, [1e-4] * 4, [1e-5] * 4))


def test_second_derivatives(recast: None) -> None:
    module = nn.ConvTranspose2d(3, 1, 4, 2, 1).double().float()
    images = torch.randn(2, 3, 4, 4, requires_grad=True)
    (first,) = torch.autograd.grad(module(images).square().sum(), images, create_graph=True)
    first.square().sum().backward()
    exact = copy.deepcopy(module).double()
    other = images.detach().double().requires_grad_()
    (again,) = torch.autograd.grad(exact(other).square().sum(), other, create_graph=True)
    again.square().sum().backward()
    assert torch.allclose(images.grad.double(), other.grad, rtol=1e-4)


def test_only_what_is_asked_for(recast: None, forms: list[bool]) -> None:
    module = nn.Conv2d(1, 8, 4, 2, 1)
    module(torch.randn(5, 1, 28, 28)).sum().backward()
    assert not any(forms)  # no one has asked for the gradient of the images
    module.weight.requires_grad_(False)
    images = torch.randn(5, 1, 28, 28, requires_grad=True)
    module(images).sum().backward()
    assert images.grad is not None
    assert module.weight.grad is not None
    assert forms[-1]


def test_under_autocast_and_channels_last(recast: None, forms: list[bool]) -> None:
    module = nn.Sequential(nn.ConvTranspose2d(8, 6, 7), nn.ConvTranspose2d(6, 1, 4, 2, 1))
    with torch.autocast("cpu", torch.bfloat16):
        output = module(torch.randn(5, 8, 1, 1))
    assert output.dtype is torch.bfloat16
    assert forms == [True, False, True]  # the second is the plain one that the third is made of


def test_a_failure_is_told_and_torch_does_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = host_in(tmp_path)
    module = nn.ConvTranspose2d(8, 6, 7)
    images = torch.randn(5, 8, 1, 1)
    bare = results(module, images)
    undo = knobs.get("convolution").apply(host, "recast")
    monkeypatch.setattr(cpu, "_memory_order", None)
    assert all(map(torch.equal, results(module, images), bare))
    undo()
    assert list(host.applied.failures) == ["convolution"]


def test_it_is_tried_where_there_are_transposed_convolutions() -> None:
    assert convolution.match(Facts("cpu")).settings == ("recast",)
    plain = Facts("cpu", operators={"aten::conv2d": 0.5})
    assert not convolution.match(plain).settings
    transposed = Facts("cpu", operators={"aten::conv_transpose2d": 0.01, "aten::mm": 0.1})
    assert convolution.match(transposed).settings == ("recast",)
