"""Draws of random numbers inside a shard: each is made for the whole batch, and the own part kept.

So the numbers, and the state in which the generator is left, are those of one process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flatout.intercept import dispatch, twister
from flatout.intercept.patch import Undo
from flatout.parallel import shards
from flatout.parallel.placement import Draw, Placement, Rows

FILLS = (
    *("bernoulli_.float", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_"),
    *("random_", "random_.from", "random_.to", "uniform_"),
)
"""Operators that fill a tensor, whatever is in it. Most others call them: ``rand``, ``randn_like``,
``randint``, ``dropout_``, ``feature_dropout``, ``native_dropout``, ``multinomial``..."""

NORMALS = ("normal.Tensor_float", "normal.float_Tensor", "normal.Tensor_Tensor")

INDIVISIBLE = (
    *("poisson", "binomial", "_standard_gamma", "_sample_dirichlet"),
    *("normal.Tensor_float_out", "normal.float_Tensor_out", "normal.Tensor_Tensor_out"),
    *("rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise.out"),
    *("randperm.generator_out", "multinomial", "multinomial.out"),
)
"""Operators that cannot draw for some samples only: how many numbers they draw depends on values,
or what they draw for a sample depends on the others."""


def install(keys: Sequence[str] = ("CPU",)) -> Undo:
    """Override the operators that draw from a generator; returns the undo.

    Args:
        keys: the dispatch keys of devices.
    """
    below_autograd: dict[str, dispatch.Override] = {
        **{name: functools.partial(_fill, name) for name in FILLS},
        **{name: functools.partial(_draw_normal, name) for name in NORMALS},
        **{name: functools.partial(_draw_indivisible, name) for name in INDIVISIBLE},
        "bernoulli_.Tensor": _fill_by_probabilities,
    }
    twister.agrees()  # it is found out here, where nothing sees what is drawn for it
    composites: dict[str, dispatch.Override] = {
        "dropout": _drop,
        "scaled_dot_product_attention": _attend,
    }
    on_failure = shards.raise_failure
    with contextlib.ExitStack() as undo:
        for key in keys:
            undo.callback(dispatch.override_operators(below_autograd, key, on_failure=on_failure))
            undo.callback(
                dispatch.override_operators(
                    composites, f"Autograd{key}", key, on_failure=on_failure
                )
            )
        return undo.pop_all().close


def _fill(
    name: str, below: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor | None:
    state = shards.current()
    if state is None:
        return None
    placement = state.next_placement(_draw(name, tensor))
    with shards.busy(state):
        if placement.dim is None:
            below(tensor, *args, **kwargs)
        elif name == "bernoulli_.float" and not dispatch.is_override(below):
            _fill_with_ones(tensor, placement, state.rows, *args, **kwargs)
        else:
            whole = empty_whole(tensor, placement, state.rows)
            below(whole, *args, **kwargs)
            tensor.copy_(placement.take(whole, state.rows))
    return tensor


def _fill_with_ones(
    tensor: torch.Tensor,
    placement: Placement,
    rows: Rows,
    p: float = 0.5,
    *,
    generator: torch.Generator | None = None,
) -> None:
    """Fill a shard's tensor with ones, each with probability ``p``, and zeros."""
    can_fill = twister.can_fill(tensor, p, generator) and twister.agrees()
    each = tensor.numel() // rows.count
    count, start = each * rows.batch, each * rows.start
    can_fill_part = can_fill and _is_outermost(tensor, placement)
    if can_fill_part and twister.fill(tensor, p, generator, count=count, start=start):
        return
    whole = empty_whole(tensor, placement, rows)
    if not (can_fill and twister.fill(whole, p, generator)):
        whole.bernoulli_(p, generator=generator)
    tensor.copy_(placement.take(whole, rows))


def _is_outermost(tensor: torch.Tensor, placement: Placement) -> bool:
    """Whether the samples of a shard follow each other in memory, as those of the batch do."""
    shape, outermost = tensor.shape, _order_in_memory(tensor, placement)[::-1]
    found = next(dim for dim in outermost if shape[dim] > 1 or dim == placement.dim)
    return placement.is_outer and found == placement.dim


def _draw(name: str, tensor: torch.Tensor) -> Draw:
    """Return the draw of an operator that fills a tensor."""
    return Draw(name, tuple(tensor.shape), order=tuple(_order_in_memory(tensor)))


def _order_in_memory(tensor: torch.Tensor, placement: Placement | None = None) -> list[int]:
    """Return the dimensions of a tensor, the innermost first; if it has one sample, those of the
    tensor for all samples."""
    dim = None if placement is None else placement.dim
    if placement is not None and placement.order and dim is not None and tensor.shape[dim] == 1:
        return list(placement.order)
    return sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), -dim))


def _fill_by_probabilities(
    below: Callable[..., Any], tensor: torch.Tensor, p: torch.Tensor, *, generator: Any = None
) -> torch.Tensor | None:
    state = shards.current()
    if state is None:
        return None
    placement = state.next_placement(_draw("bernoulli_.Tensor", tensor))
    with shards.busy(state):
        if placement.dim is None:
            below(tensor, p, generator=generator)
        else:
            whole = empty_whole(tensor, placement, state.rows)
            probabilities = _spread(p, tensor.shape, placement, state.rows)
            below(whole, probabilities, generator=generator)
            tensor.copy_(placement.take(whole, state.rows))
    return tensor


def _draw_normal(
    name: str, below: Callable[..., Any], mean: Any, std: Any, *, generator: Any = None
) -> torch.Tensor | None:
    state = shards.current()
    if state is None:
        return None
    tensors = [x for x in (mean, std) if isinstance(x, torch.Tensor)]
    shape = torch._C._infer_size(tensors[0].shape, tensors[-1].shape)
    placement = state.next_placement(Draw(name, tuple(shape)))
    with shards.busy(state):
        if placement.dim is None:
            drawn: torch.Tensor = below(mean, std, generator=generator)
            return drawn
        spread = [
            _spread(x, shape, placement, state.rows) if isinstance(x, torch.Tensor) else x
            for x in (mean, std)
        ]
        whole = below(*spread, generator=generator)
        return placement.take(whole, state.rows).contiguous()


def _draw_indivisible(name: str, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    state = shards.current()
    if state is None or not _draws_indivisibly(name, *args, **kwargs):
        return None
    shape = (args[0],) if name.startswith("randperm") else tuple(args[0].shape)
    state.next_placement(Draw(name, shape, is_divisible=False))
    with shards.busy(state):
        return below(*args, **kwargs)


def _draws_indivisibly(name: str, *args: Any, **kwargs: Any) -> bool:
    if name.startswith("rrelu"):
        training = args[4] if len(args) > 4 else kwargs.get("training", False)
        return bool(training)
    if name.startswith("multinomial"):  # otherwise it draws by exponential_
        replacement = args[2] if len(args) > 2 else kwargs.get("replacement", False)
        return bool(replacement) and args[1] > 1
    return True


def _drop(
    below: Callable[..., Any], tensor: torch.Tensor, p: float, train: bool
) -> dispatch.DeferredCall | None:
    state = shards.current()
    if state is None or not train or p <= 0 or p >= 1 or not tensor.numel():
        return None
    placement = state.next_placement(_draw("dropout", tensor))
    if placement.dim is None:
        return dispatch.DeferredCall(_call_busy, (state, below, tensor, p, train))
    if not tensor.is_cpu:
        return dispatch.DeferredCall(
            _drop_fused, (tensor, _draw_mask(tensor, p, placement, state), p)
        )
    if not dispatch.is_override(below):
        # As torch's own dropout does (ATen/native/Dropout.cpp).
        noise = torch.empty_like(tensor.detach())
        with shards.busy(state):
            _fill_with_ones(noise, placement, state.rows, 1 - p)
        return dispatch.DeferredCall(torch.mul, (tensor, noise.div_(1 - p)))
    with shards.busy(state):
        ones = empty_whole(torch.empty_like(tensor, device="meta"), placement, state.rows, "cpu")
        factors = below(ones.fill_(1), p, train)
    # A view would keep the factors of all samples until the backward pass.
    part = placement.take(factors, state.rows).clone(memory_format=torch.preserve_format)
    return dispatch.DeferredCall(torch.mul, (tensor, part))


def _draw_mask(
    tensor: torch.Tensor, p: float, placement: Placement, state: shards.Shard
) -> torch.Tensor:
    """Return which elements dropout keeps on an accelerator, where torch has one operator for it
    (``is_fused_kernel_acceptable`` in ``ATen/native/Dropout.cpp``)."""
    with shards.busy(state):
        like = torch.empty_like(tensor, device="meta")
        ones = empty_whole(like, placement, state.rows, tensor.device)
        _, mask = torch.native_dropout(ones.fill_(1), p, True)
    return placement.take(mask, state.rows).clone(memory_format=torch.preserve_format)


def _drop_fused(tensor: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """Compute what ``native_dropout`` does, which rounds once."""
    return tensor * mask * (1 / (1 - p))


def _attend(
    below: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *args: Any,
    **kwargs: Any,
) -> dispatch.DeferredCall | None:
    state = shards.current()
    if state is None or not dropout_p or (query.is_cpu and not dispatch.is_override(below)):
        return None  # torch's own attention on the CPU calls dropout
    shape = (*query.shape[:-1], key.shape[-2])
    state.next_placement(Draw("scaled_dot_product_attention", shape, is_divisible=False))
    inputs = (query, key, value, attn_mask, dropout_p, *args)
    return dispatch.DeferredCall(_call_busy, (state, below, *inputs), kwargs)


def _call_busy(state: shards.Shard, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with shards.busy(state):
        return below(*args, **kwargs)


def _spread(
    values: torch.Tensor, shape: torch.Size, placement: Placement, rows: Rows
) -> torch.Tensor:
    """Return a tensor for all samples with the own values, and 1/2 for the other samples."""
    whole = values.new_full(placement.whole_shape(shape, rows), 0.5)
    placement.put(whole, values.expand(shape), rows)
    return whole


def empty_whole(
    tensor: torch.Tensor,
    placement: Placement,
    rows: Rows,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return an empty tensor for all samples, with its dimensions in memory in the order of those
    of a shard's tensor, because random numbers are drawn in this order.

    Args:
        tensor: for the samples of the shard.
        placement: where the samples are in it.
        rows: of the shard.
        device: of the new tensor; by default that of ``tensor``.
    """
    assert placement.dim is not None
    whole = placement.whole_shape(tensor.shape, rows)
    strides, order = list(tensor.stride()), _order_in_memory(tensor, placement)
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, strides, strict=True))
    if extent == tensor.numel():
        step = 1
        for dim in order:
            strides[dim] = step
            step *= whole[dim]
    else:
        for dim in order[order.index(placement.dim) + 1 :]:
            strides[dim] = -(-strides[dim] // rows.count) * rows.batch
    return torch.empty_strided(whole, strides, dtype=tensor.dtype, device=device or tensor.device)
