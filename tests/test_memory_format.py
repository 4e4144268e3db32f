"""The knob ``memory_format``: convolutions get channels last, and nobody else notices."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatout import knobs
from flatout.intercept.host import Host
from flatout.knobs.memory_format import channels_last, gradients
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    yield made
    made.hooks.remove()


class Net(nn.Module):
    """Remembers the strides of its activations."""

    def __init__(self, groups: int = 1, views: bool = False, channels: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1, bias=False)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.third = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.norm, self.drop, self.head = nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Linear(128, 4)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=groups)
        self.views = views
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = F.relu(self.norm(self.first(x)))
        self.seen.append(x.stride(1) == 1)
        x = F.max_pool2d(self.third(self.second(x)), 2)
        flat = x.view(len(x), -1) if self.views else x.flatten(1)
        return {"class": self.head(self.drop(flat)), "map": self.up(x)}


def train(net: Net, steps: int = 8, turn: Any = None, **options: Any) -> list[torch.Tensor]:
    """Losses and final weights; ``turn`` is called with the step's number."""
    torch.manual_seed(0)
    x = torch.randn(8, net.first.in_channels, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, **options)
    losses = []
    for step in range(steps):
        if turn is not None:
            turn(step)
        output = net(x)
        assert output["map"].is_contiguous()
        loss = F.cross_entropy(output["class"], torch.arange(8) % 4) + output["map"].view(-1).std()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    for param in net.parameters():
        tensors = (param, param.grad, *optimizer.state[param].values())
        assert all(t is not None and t.is_contiguous() for t in tensors)
    return [torch.stack(losses), *(p.detach() for p in net.parameters()), *net.buffers()]


def made(**options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options)


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_the_training_is_the_same_whatever_the_optimizer(
    host: Host, options: dict[str, Any], channels: int
) -> None:
    expected = train(made(channels=channels), **options)
    undo = knobs.get("memory_format").apply(host, "channels_last")
    net = made(channels=channels)
    found = train(net, **options)
    undo()
    assert all(net.seen)
    close(found, expected)


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_switched_in_the_middle_of_a_run(host: Host, options: dict[str, Any]) -> None:
    expected = train(made(), **options)
    undos: list[Any] = []

    def turn(step: int) -> None:
        if step == 3:
            undos.append(knobs.get("memory_format").apply(host, "channels_last"))
        if step == 6:
            undos[0]()

    net = made()
    found = train(net, turn=turn, **options)
    assert net.seen == [False] * 3 + [True] * 3 + [False] * 2
    close(found, expected)


def test_where_torch_fails_on_the_format_the_program_gets_the_error_and_the_knob_is_turned_back(
    host: Host,
) -> None:
    net = made(views=True)
    undo = knobs.get("memory_format").apply(host, "channels_last")
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        train(net)
    assert "view size is not compatible" in host.applied.failures["memory_format"]
    train(net)
    undo()
    assert net.seen == [True] + [False] * 8  # never twice for one call


def test_an_error_of_the_program_turns_nothing_back(host: Host) -> None:
    class SkippedError(Exception):
        pass

    class Skipping(Net):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            super().forward(x)
            raise SkippedError

    undo = knobs.get("memory_format").apply(host, "channels_last")
    with pytest.raises(SkippedError) as raised:
        Skipping()(torch.randn(2, 3, 8, 8))
    undo()
    assert raised.traceback[-1].name == "forward"
    assert not host.applied.failures


def test_grouped_convolutions_are_left_alone(host: Host) -> None:
    undo = knobs.get("memory_format").apply(host, "channels_last")
    net = made(groups=8)
    train(net, 2)
    undo()
    assert not any(net.seen)


def test_a_model_in_channels_last_already(host: Host) -> None:
    net = made().to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    expected = net.eval()(x)
    undo = knobs.get("memory_format").apply(host, "channels_last")
    found = net(x)
    undo()
    assert torch.equal(found["class"], expected["class"])


def test_compiled_it_is_left_to_the_compiler(host: Host) -> None:
    net = made().eval()
    x = torch.randn(2, 3, 8, 8)
    expected = net(x)["class"]
    undo = knobs.get("memory_format").apply(host, "channels_last")
    found = torch.compile(net, backend="aot_eager")(x)["class"]
    undo()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 4, 5), (1, 4, 1, 1), (3, 1, 1, 1)])
def test_turned_around(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = channels_last(x)
    assert torch.equal(x, y)
    assert y.stride(1) == 1
    assert channels_last(y).data_ptr() == y.data_ptr()
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(gradient, 2 * x)


OPERATORS: dict[str, Any] = {
    "threshold_backward": (0.0,),
    "leaky_relu_backward": (0.1, False),
    "hardtanh_backward": (-1.0, 1.0),
    "native_batch_norm_backward": (
        *(torch.ones(6), torch.zeros(6), torch.ones(6), torch.zeros(6), torch.ones(6)),
        *(True, 1e-5, [True, True, True]),
    ),
}


@pytest.mark.parametrize("name", gradients.BACKWARD)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_come_in_the_layout_of_the_activations(
    host: Host, name: str, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    activations = torch.rand(3, 6, 5, 4, generator=generator).contiguous(memory_format=layout)
    gradient = torch.randn(3, 6, 5, 4, generator=generator)
    other = next(f for f in (torch.channels_last, torch.contiguous_format) if f != layout)
    operator = getattr(torch.ops.aten, name)
    rest = OPERATORS.get(name, ())
    bare = operator(gradient.contiguous(memory_format=layout), activations, *rest)
    undo = knobs.get("memory_format").apply(host, "channels_last")
    found = operator(gradient.contiguous(memory_format=other), activations, *rest)
    spread = operator(gradient[:, :, :1, :1].expand(3, 6, 5, 4), activations, *rest)
    undo()
    bare, found, spread = (x[0] if isinstance(x, tuple) else x for x in (bare, found, spread))
    assert torch.equal(found, bare)
    assert found.is_contiguous(memory_format=layout)
    assert spread.is_contiguous(memory_format=layout)
    assert not host.applied.failures


def test_a_failure_of_ours_leaves_gradients_to_torch(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = knobs.get("memory_format").apply(host, "channels_last")
    monkeypatch.setattr(gradients, "torch", None)
    x = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    (found,) = torch.autograd.grad(F.relu(x).flatten(1).sum(), x)
    monkeypatch.undo()
    undo()
    assert torch.equal(found, (x > 0).float())
    assert list(host.applied.failures) == ["memory_format"]


def test_the_first_image_of_one_pixel_is_turned_around(host: Host) -> None:
    up = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU())
    seen: list[bool] = []
    up[1].register_forward_hook(lambda *args: seen.append(args[2].stride(1) == 1))
    undo = knobs.get("memory_format").apply(host, "channels_last")
    up(torch.randn(2, 4, 1, 1))
    undo()
    assert seen == [True]
