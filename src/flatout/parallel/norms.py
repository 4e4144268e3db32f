"""Batch norm inside a shard: the statistics are those of the samples of all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from flatout.intercept import dispatch
from flatout.intercept.patch import Undo, wrap_function
from flatout.parallel import shards
from flatout.parallel.placement import UnshareableError
from flatout.parallel.sums import sum_over_ranks

_autograd: Any = torch.autograd

_TRAINING_ARGUMENT = {
    "native_batch_norm": 5,
    "_native_batch_norm_legit": 5,
    "_native_batch_norm_legit.no_stats": 3,
}
"""Operators that compute batch norm, with the position of their argument ``training``."""


def install(keys: Sequence[str] = ("CPU",)) -> Undo:
    """Override batch norm and instance norm; returns the undo.

    Args:
        keys: the dispatch keys of devices.
    """
    natives: dict[str, dispatch.Override] = {
        name: _refuse_if_training(position) for name, position in _TRAINING_ARGUMENT.items()
    }
    with contextlib.ExitStack() as undo:
        undo.callback(
            dispatch.override_operators(
                {"batch_norm": _batch_norm, "instance_norm": _instance_norm},
                *(f"{prefix}{key}" for key in keys for prefix in ("Autograd", "")),
                on_failure=shards.raise_failure,
            )
        )
        undo.callback(
            dispatch.override_operators(
                {**natives, "_batch_norm_with_update": _refuse},
                *keys,
                on_failure=shards.raise_failure,
            )
        )
        undo.callback(
            wrap_function(F, "_verify_batch_size", shards.raise_failure, _verify_batch_size)
        )
        return undo.pop_all().close


def _refuse_if_training(position: int) -> dispatch.Override:
    def refuse_if_training(below: Callable[..., Any], *args: Any) -> None:
        if args[position]:
            _refuse(below)

    return refuse_if_training


def _refuse(below: Callable[..., Any], *args: Any) -> None:
    """Refuse batch norm that is called in another way than by ``torch.batch_norm``, for example
    inside ``torch.func.vmap``."""
    if shards.current() is not None:
        raise UnshareableError("computes batch norm by an internal operator of torch")


def _verify_batch_size(original: Callable[..., None], size: Sequence[int]) -> None:
    """Verify the size of the whole batch: a shard may have one value for each channel."""
    state = shards.current()
    original(size if state is None else [size[0] * state.rows.batch, *size[1:]])


# Batch norm


@dataclass(frozen=True)
class _Statistics:
    """Statistics of each channel over all ranks.

    Attributes:
        count: number of values of a channel; float64, no dimension.
        mean, variance: of the channels; the variance is the biased one.
        eps: is added to the variance.
        sum_gradients: as in ``shards.shard``.
    """

    count: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    eps: float
    sum_gradients: shards.SumOverRanks


def _batch_norm(
    below: Callable[..., Any],
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> dispatch.DeferredCall | None:
    state = shards.current()
    if state is None or not training or tensor.dim() < 2:
        return None
    statistics = _measure(tensor, eps, state)
    unbiased = statistics.variance * (statistics.count / (statistics.count - 1))
    _update(running_mean, statistics.mean, momentum)
    _update(running_var, unbiased, momentum)
    return dispatch.DeferredCall(_Normalize.apply, (statistics, tensor, weight, bias))


def _measure(tensor: torch.Tensor, eps: float, state: shards.Shard) -> _Statistics:
    channels = tensor.shape[1]
    own_count = tensor.numel() // max(channels, 1)
    count = torch.full((1,), own_count, dtype=torch.float64, device=tensor.device)
    center = torch.zeros(channels, dtype=torch.float64, device=tensor.device)
    mean, variance = center, center
    if tensor.numel():
        mean, variance = (x.double() for x in _measure_own(tensor))
    if tensor.dtype is torch.float64:
        # Squares of means that are far from 0 would cancel. In float64 they do so below the
        # precision of the other types.
        (sums,) = state.sum_over_ranks([torch.cat((count, count * mean))])
        center = sums[1:] / sums[0]
    mean = mean - center
    own = torch.cat((count, count * mean, count * (variance + mean.square())))
    (sums,) = state.sum_over_ranks([own])
    total, mean, square = sums[0], sums[1 : channels + 1], sums[channels + 1 :]
    mean = mean / total
    variance = (square / total - mean.square()).clamp_min_(0)
    return _Statistics(total, mean + center, variance, eps, state.sum_gradients)


def _measure_own(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of the channels of a shard."""
    dtype = _accumulated(tensor)
    if tensor.is_cpu and tensor.dim() > 2 and tensor.is_contiguous():
        return _measure_planes(tensor.flatten(2), dtype)
    if tensor.is_cpu:
        # Running statistics set the type in which it computes.
        running = torch.zeros(tensor.shape[1], dtype=dtype, device="cpu")
        return torch.batch_norm_update_stats(tensor, running, running.clone(), 0.0)
    others = [0, *range(2, tensor.dim())]
    variance, mean = torch.var_mean(tensor.to(dtype), others, correction=0)
    return mean, variance


def _measure_planes(planes: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and biased variance of the channels of contiguous samples, for which torch's own
    operator takes several times as long.

    Args:
        planes: by sample and channel.
        dtype: in which torch computes batch norm. Of each plane, it is that of sums here.
    """
    samples, _, length = planes.shape
    count = samples * length
    mean = planes.sum(2, dtype=dtype).double().sum(0) / count
    centered = planes - mean.to(dtype)[:, None]
    variance = centered.square_().sum(2).double().sum(0) / count
    return mean, variance


def _update(running: torch.Tensor | None, value: torch.Tensor, momentum: float) -> None:
    """Update running statistics. Torch does so without a trace in the version of the tensor, which
    an earlier call in evaluation mode may have saved for backward."""
    if running is not None:
        with _autograd._unsafe_preserve_version_counter(running):
            running.copy_(momentum * value + (1 - momentum) * running.double())


def _accumulated(tensor: torch.Tensor) -> torch.dtype:
    """Return the type in which torch computes batch norm."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32


class _Normalize(torch.autograd.Function):
    """Batch norm with statistics over all ranks that are known already.

    Inside of a shard, gradients are those of one process times the number of ranks, and gradients
    of parameters are partial. So the sums over samples are sums over all ranks where they are part
    of a gradient of samples, and stay partial where they are gradients of weight and bias.
    """

    @staticmethod
    def forward(
        ctx: Any,
        statistics: _Statistics,
        tensor: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the normalized tensor."""
        ctx.statistics = statistics
        ctx.save_for_backward(tensor, weight)
        ctx.bias_type = None if bias is None else bias.dtype
        return _apply(tensor, weight, bias, statistics)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of the tensor, the weight and the bias."""
        tensor, weight = ctx.saved_tensors
        compute = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        of_tensor, of_weight, of_bias = compute(
            gradient, tensor, weight, ctx.statistics, ctx.needs_input_grad[1]
        )
        return (
            None,
            of_tensor,
            None if weight is None else of_weight.to(weight.dtype),
            None if ctx.bias_type is None else of_bias.to(ctx.bias_type),
        )


def _apply(
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    statistics: _Statistics,
) -> torch.Tensor:
    """Normalize by given statistics, in one pass."""
    dtype = _accumulated(tensor)
    weight, bias, mean, variance = (
        None if x is None else x.detach().to(dtype)
        for x in (weight, bias, statistics.mean, statistics.variance)
    )
    return torch.native_batch_norm(
        tensor, weight, bias, mean, variance, False, 0.0, statistics.eps
    )[0]


def _gradients(
    gradient: torch.Tensor,
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: _Statistics,
    is_tensor_needed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients of tensor, weight and bias."""
    dtype = _accumulated(tensor)
    values, gradient = tensor.to(dtype), gradient.to(dtype)
    scale = None if weight is None else weight.to(dtype)
    mean, variance = statistics.mean.to(dtype), statistics.variance.to(dtype)
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
        *(gradient, values, scale, mean, variance, None, None, False, statistics.eps),
        [False, True, True],
    )
    # Another rank may need the sums though this one does not.
    (sums,) = statistics.sum_gradients([torch.cat((of_weight, of_bias)).double()])
    if not is_tensor_needed:
        return None, of_weight, of_bias
    factor = (statistics.variance + statistics.eps).rsqrt()
    if weight is not None:
        factor = factor * weight.double()
    by_weight, by_bias = sums.view(2, -1) * (-factor / statistics.count)
    # What the samples change in the statistics; then as if these were constants.
    through = _apply(values, by_weight, by_bias, statistics)
    by_channel = factor.to(dtype).view(-1, *[1] * (tensor.dim() - 2))
    return through.addcmul_(gradient, by_channel).to(tensor.dtype), of_weight, of_bias


def _differentiable_gradients(
    gradient: torch.Tensor,
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    statistics: _Statistics,
    is_tensor_needed: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients of tensor, weight and bias, computed by differentiable operators."""
    dtype = _accumulated(tensor)
    values, gradient = tensor.to(dtype), gradient.to(dtype)
    others = [0, *range(2, tensor.dim())]
    by_channel = (-1, *[1] * (tensor.dim() - 2))

    def add(*parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return sum_over_ranks(statistics.sum_gradients, *parts)

    count = statistics.count.to(dtype)
    (total,) = add(values.sum(others))
    centered = values - (total / count).view(by_channel)
    (square,) = add(centered.square().sum(others))
    scale = (square / count + statistics.eps).rsqrt()
    normalized = centered * scale.view(by_channel)
    of_weight, of_bias = (gradient * normalized).sum(others), gradient.sum(others)
    by_weight, by_bias = add(of_weight, of_bias)
    if not is_tensor_needed:
        return None, of_weight, of_bias
    remaining = gradient - (by_bias / count).view(by_channel)
    remaining = remaining - normalized * (by_weight / count).view(by_channel)
    factor = scale if weight is None else scale * weight
    return (remaining * factor.view(by_channel)).to(tensor.dtype), of_weight, of_bias


# Instance norm


def _instance_norm(
    below: Callable[..., Any],
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    use_input_stats: bool,
    *args: Any,
) -> dispatch.DeferredCall | None:
    state = shards.current()
    if state is None or not use_input_stats:
        return None
    inputs = (tensor, weight, bias, running_mean, running_var, use_input_stats, *args)
    return dispatch.DeferredCall(_normalize_instances, (state, below, *inputs))


def _normalize_instances(
    state: shards.Shard,
    below: Callable[..., Any],
    tensor: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    *args: Any,
) -> Any:
    """Compute instance norm, which calls batch norm inside. Its running statistics are means over
    the samples."""
    with shards.busy(state):
        output = below(tensor, weight, bias, running_mean, running_var, *args)
    running = [x for x in (running_mean, running_var) if x is not None]
    if running:
        rows = tensor.shape[0]
        count = torch.full((1,), rows, dtype=torch.float64, device=tensor.device)
        parts = [count, *(x.detach().double() * rows for x in running)]
        total, *sums = state.sum_over_ranks(parts)
        for statistic, value in zip(running, sums, strict=True):
            with torch.no_grad(), _autograd._unsafe_preserve_version_counter(statistic):
                statistic.copy_(value / total)
    return output
