"""The knobs ``zero_grad``, ``evaluation``, ``cudnn`` and ``cuda_allocator``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flatout import knobs
from flatout.errors import RefusedError
from flatout.intercept import device
from flatout.intercept.host import Host
from flatout.knobs import cuda_allocator
from flatout.wire.request import Request
from tests.hosts import host_in


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = host_in(tmp_path)
    made.hooks.install(live=False)
    yield made
    made.hooks.remove()


# zero_grad


class Branches(nn.Module):
    """One branch of two gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, goes_left: bool) -> torch.Tensor:
        return (self.left if goes_left else self.right)(x)


def train(undo_at: int | None = None, undo: Any = None) -> tuple[list[torch.Tensor], list[bool]]:
    torch.manual_seed(0)
    net = Branches()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    x, dropped = torch.randn(8, 4), []
    for step in range(8):
        if step == undo_at:
            undo()
        loss = net(x, goes_left=step < 3 or step % 2 == 0).square().mean()
        optimizer.zero_grad(set_to_none=False)
        dropped.append(net.left.weight.grad is None)
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()], dropped


@pytest.mark.parametrize("undo_at", [None, 4])
def test_dropped_gradients_are_zeros_to_the_optimizer(host: Host, undo_at: int | None) -> None:
    expected, dropped = train()
    assert not any(dropped[1:])
    undo = knobs.get("zero_grad").apply(host, "none")
    found, dropped = train(undo_at, undo)
    if undo_at is None:
        undo()
    assert all(dropped[:undo_at])
    assert not any(dropped[undo_at:] if undo_at else [])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


# evaluation


def recorded(net: nn.Module, x: torch.Tensor, count: int = 4) -> list[bool]:
    return [net(x).requires_grad for _ in range(count)]


def test_evaluation_is_without_a_graph_from_its_third_pass_on(host: Host) -> None:
    net, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    undo = knobs.get("evaluation").apply(host, "no_grad")
    assert recorded(net, x) == [True, True, False, False]
    assert recorded(net.train(), x) == [True] * 4
    assert recorded(net.eval(), x, 1) == [False]
    undo()
    assert recorded(net, x) == [True] * 4


def test_a_network_of_a_loss_is_left_alone(host: Host) -> None:
    features, generator = nn.Linear(4, 4).eval(), nn.Linear(4, 4)
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1)
    x = torch.randn(3, 4)

    def run() -> list[float]:
        torch.manual_seed(0)
        generator.reset_parameters()
        losses = []
        for _ in range(5):
            loss = F.mse_loss(features(generator(x)), features(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = run()
    undo = knobs.get("evaluation").apply(host, "no_grad")
    found = run()
    undo()
    assert found == expected


def test_training_in_evaluation_mode_is_left_alone(host: Host) -> None:
    net, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    undo = knobs.get("evaluation").apply(host, "no_grad")
    for _ in range(5):
        net(x).sum().backward()
    undo()
    assert torch.equal(net.bias.grad, torch.full((2,), 15.0))  # of five passes over three rows


# cudnn, cuda_allocator: what can be seen without a device


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    flags = torch.backends.cudnn
    before = flags.benchmark, flags.deterministic
    yield flags
    flags.benchmark, flags.deterministic = before


def test_cudnn_benchmark_on_and_off(host: Host, cudnn: Any) -> None:
    undo = knobs.get("cudnn").apply(host, "benchmark")
    assert cudnn.benchmark
    undo()
    assert not cudnn.benchmark


def test_cudnn_where_the_program_has_decided(host: Host, cudnn: Any) -> None:
    cudnn.benchmark = True
    with pytest.raises(RefusedError, match="set"):
        knobs.get("cudnn").apply(host, "benchmark")
    cudnn.benchmark, cudnn.deterministic = False, True
    with pytest.raises(RefusedError, match="deterministic"):
        knobs.get("cudnn").apply(host, "benchmark")


def test_cudnn_where_there_is_none(host: Host) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RefusedError, match="no cuDNN"):
        knobs.get("cudnn").apply(host, "benchmark")


def test_the_allocator_of_cuda(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    knob = knobs.get("cuda_allocator")
    asked = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert knobs.prepare(Request(settings={"cuda_allocator": "expandable"}), {}) == asked
    for name in (cuda_allocator.VARIABLE, cuda_allocator.SUCCESSOR):
        assert knob.variables is not None
        assert knob.variables("expandable", {name: "backend:cudaMallocAsync"}) == {}
    with pytest.raises(RefusedError, match="no CUDA"):
        knob.apply(host, "expandable")
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setenv(cuda_allocator.SUCCESSOR, "backend:cudaMallocAsync")
    with pytest.raises(RefusedError, match="PYTORCH_ALLOC_CONF was set"):
        knob.apply(host, "expandable")
    monkeypatch.delenv(cuda_allocator.SUCCESSOR)
    monkeypatch.setenv(*next(iter(asked.items())))
    knob.apply(host, "expandable")()
