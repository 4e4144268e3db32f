"""Batch norm in shards against batch norm in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatout.parallel import shards
from flatout.parallel.placement import UnshareableError
from tests.rank_processes import Rank, Ranks, installed


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: Any, tmp_path_factory: Any) -> Iterator[Ranks]:
    found = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield found
    found.close()


class Functional(nn.Module):
    """Batch norm by its function, with and without statistics that run."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4) + 0.5)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.mean, self.var, self.weight, None, True, 0.3, 1e-3)
        return F.batch_norm(x.square(), None, None, None, self.weight, True)


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return result


def _network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)),
        *(nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.LazyLinear(5), nn.BatchNorm1d(5)),
    )


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: nn.BatchNorm1d(4), (7, 4)),
    "sequences": (lambda: nn.BatchNorm1d(4), (7, 4, 5)),
    "images": (lambda: nn.BatchNorm2d(4), (7, 4, 3, 3)),
    "volumes": (lambda: nn.BatchNorm3d(4), (5, 4, 2, 3, 2)),
    "one row each": (lambda: nn.BatchNorm1d(4), (3, 4)),
    "cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), (7, 4)),
    "no affine": (lambda: nn.BatchNorm2d(4, affine=False), (7, 4, 3, 3)),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (7, 4, 3, 3)),
    "evaluation": (lambda: nn.BatchNorm1d(4).eval(), (7, 4)),
    "functional": (Functional, (7, 4, 3)),
    "synchronized": (lambda: nn.SyncBatchNorm(4), (7, 4, 3)),
    "network": (_network, (7, 3, 8, 8)),
    "instances": (lambda: nn.InstanceNorm1d(4, affine=True), (7, 4, 5)),
    "tracked": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (7, 4, 3, 3)),
    "layer": (lambda: nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(2, 4)), (7, 4)),
    "checkpoint": (lambda: Checkpointed(False), (7, 4)),
    "reentrant": (lambda: Checkpointed(True), (7, 4)),
}


def _make(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    x = torch.randn(shape, dtype=torch.float64)
    module = make().to(torch.float64)
    with torch.no_grad():
        copy.deepcopy(module)(x)
        module(x)
        for parameter in module.parameters():
            parameter += torch.rand_like(parameter) / 4
    return module.to(dtype), x.to(dtype)


def _train(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, average: Any) -> Any:
    """Losses, outputs, gradients and buffers of two steps; the loss is no mean over samples."""
    found = []
    for step in range(2):
        module.zero_grad()
        inputs = (x * (1 + step)).requires_grad_()
        output = call(inputs)
        (
            (output * torch.linspace(1, 2, output.numel()).view_as(output)).cos().mean() + 2
        ).sqrt().backward()
        average(module)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= parameter.grad
        found += [output.detach(), inputs.grad, *(p.grad for p in module.parameters())]
        found += [buffer.clone() for buffer in module.buffers()]
    return found


def _compare_with_one_process(rank: Rank, name: str) -> None:
    module, x = _make(name, torch.float64)
    alone = copy.deepcopy(module)
    expected = _train(alone, alone, x, lambda module: None)
    with installed():
        found = _train(module, lambda inputs: rank.call(module, inputs), x, rank.average)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    is_summed = name not in ("evaluation", "instances", "layer")
    assert (rank.sums > 0) is is_summed


@pytest.mark.parametrize("name", MODULES)
def test_one_process(ranks: Ranks, name: str) -> None:
    assert ranks.find_failures(_compare_with_one_process, name) == ""


def _compare_in_low_precision(rank: Rank, dtype: torch.dtype) -> None:
    module, x = _make("images", torch.float64)
    x = (x + 3).to(memory_format=torch.channels_last)
    low, alone = copy.deepcopy(module).to(dtype), copy.deepcopy(module).to(dtype)
    exact = _train(module, module, x, lambda module: None)
    expected = _train(alone, alone, x.to(dtype), lambda module: None)
    with installed():
        found = _train(low, lambda inputs: rank.call(low, inputs), x.to(dtype), rank.average)
    for ours, torchs, value in zip(found, expected, exact, strict=True):
        assert ours.dtype is torchs.dtype
        error, torchs_error = ((a.double() - value).norm() for a in (ours, torchs))
        bound = 2 * torchs_error + 8 * torch.finfo(dtype).eps * value.double().norm()
        assert error <= bound, (ours.shape, error, torchs_error, value.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(ranks: Ranks, dtype: torch.dtype) -> None:
    assert ranks.find_failures(_compare_in_low_precision, dtype) == ""


def _compare_far_from_zero(rank: Rank) -> None:
    x = torch.randn(8, 4, dtype=torch.float64) * torch.logspace(-2, 2, 4) + 1e4
    with installed():
        found = rank.call(lambda part: F.batch_norm(part, None, None, training=True), x)
    torch.testing.assert_close(found, F.batch_norm(x, None, None, training=True), rtol=0, atol=1e-8)


def test_values_far_from_zero(ranks: Ranks) -> None:
    assert ranks.find_failures(_compare_far_from_zero) == ""


def _compare_penalty(rank: Rank) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Softplus(), nn.Linear(4, 4)),
        *(nn.BatchNorm1d(4, affine=False), nn.Tanh(), nn.Linear(4, 1)),
    ).double()
    x = torch.randn(7, 3, dtype=torch.float64)

    def penalize(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        score = call(inputs).square().sum()
        (slope,) = torch.autograd.grad(score, inputs, create_graph=True)
        (score + (slope.norm(dim=1) - 1).square().mean()).backward()
        return [slope.detach(), inputs.grad]

    expected = penalize(module)
    expected += [parameter.grad.clone() for parameter in module.parameters()]
    with installed():
        found = penalize(lambda inputs: rank.call(module, inputs))
    rank.average(module)
    found += [parameter.grad for parameter in module.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_double_backward(ranks: Ranks) -> None:
    assert ranks.find_failures(_compare_penalty) == ""


def _normalize_under_vmap(x: Tensor) -> Tensor:
    return torch.func.vmap(lambda row: F.batch_norm(row, None, None, training=True))(x)


def test_batch_norm_under_vmap_is_refused() -> None:
    x = torch.randn(4, 6, 3)
    expected = _normalize_under_vmap(x)
    with installed():
        assert torch.equal(_normalize_under_vmap(x), expected)
        with (
            pytest.raises(UnshareableError, match="internal operator"),
            shards.shard(0, 4, 8, lambda tensors: tensors),
        ):
            _normalize_under_vmap(x)


def test_a_batch_of_one_value_is_an_error_as_ever() -> None:
    norm, one = nn.BatchNorm1d(3), torch.randn(1, 3)
    verify = F._verify_batch_size
    with installed():
        with pytest.raises(ValueError, match="more than 1 value"):
            norm(one)
        with (
            pytest.raises(ValueError, match="more than 1 value"),
            shards.shard(0, 1, 1, lambda tensors: tensors),
        ):
            norm(one)
    assert F._verify_batch_size is verify


def test_statistics_that_run_keep_their_version() -> None:
    norm, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    with installed(), shards.shard(0, 4, 8, lambda tensors: tensors):
        assert norm.running_mean is not None
        before = norm.running_mean._version
        frozen = F.batch_norm(x.clone().requires_grad_(), norm.running_mean, norm.running_var)
        norm(x)
        assert norm.running_mean._version == before
        frozen.sum().backward()
