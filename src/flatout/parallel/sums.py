"""Sums and means over samples inside a shard, such as losses: they are those of the whole batch.

A shard adds up its own terms, the ranks add up these sums, and every rank goes on with the result:
``reduction="mean"`` divides it by the number of terms, or the sum of their weights, of all ranks.
So whatever a module computes from such sums is the same on all ranks. A tensor without a row for
each sample that depends on samples in another way is noticed by the tests of a rule.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.intercept.patch import Undo
from flatout.parallel import shards
from flatout.parallel.placement import UnshareableError

_LOSSES = (
    *("cross_entropy_loss", "nll_loss", "nll_loss2d", "mse_loss", "smooth_l1_loss", "huber_loss"),
    *("soft_margin_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
)
"""Operators that have terms and, by their argument ``reduction``, add them up. Most others, such as
``l1_loss`` and ``ctc_loss``, call ``sum`` or ``mean``."""

_BY_CLASS = frozenset(("cross_entropy_loss", "nll_loss", "nll_loss2d"))
"""Losses whose mean is weighted by class, and leaves out targets of the value ``ignore_index``."""

_NONE, _MEAN = 0, 1
"""Values of ``reduction``."""


def install(keys: Sequence[str] = ("CPU",)) -> Undo:
    """Override the operators that add up all elements of a tensor; returns the undo.

    Args:
        keys: the dispatch keys of devices.
    """
    overrides: dict[str, dispatch.Override] = {
        "sum": functools.partial(_add_up, False),
        "mean": functools.partial(_add_up, True),
        **{name: functools.partial(_lose, name) for name in _LOSSES},
    }
    inside = {name: functools.partial(_outermost, override) for name, override in overrides.items()}
    with contextlib.ExitStack() as undo:
        for key in keys:
            for found, at in ((overrides, f"Autograd{key}"), (inside, key)):
                on_failure = shards.raise_failure
                undo.callback(dispatch.override_operators(found, at, on_failure=on_failure))
        return undo.pop_all().close


def _outermost(override: dispatch.Override, *args: Any, **kwargs: Any) -> Any:
    """Call an override below autograd only in inference mode, where nothing is above it. Otherwise
    this is a part of another operator."""
    return override(*args, **kwargs) if torch.is_inference_mode_enabled() else None


def _add_up(
    is_mean: bool,
    below: Callable[..., Any],
    tensor: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> dispatch.DeferredCall | None:
    state = shards.current()
    if state is None or state.leaves_sums or tensor.is_complex():
        return None
    if not state.next_sum("mean" if is_mean else "sum", tensor.shape):
        return dispatch.DeferredCall(_call_busy, (state, below, tensor), {"dtype": dtype})
    return dispatch.DeferredCall(_add_up_terms, (state, tensor, is_mean, dtype))


def _lose(name: str, below: Callable[..., Any], *args: Any) -> dispatch.DeferredCall | None:
    state = shards.current()
    if state is None or state.leaves_sums:
        return None
    operator: Any = getattr(torch.ops.aten, name).default
    names = [argument.name for argument in operator._schema.arguments]
    defaults = [argument.default_value for argument in operator._schema.arguments]
    given = dict(zip(names, [*args, *defaults[len(args) :]], strict=True))
    if given["reduction"] == _NONE:
        return None
    if not state.next_sum(name, _shape_of_terms(name, given)):
        return dispatch.DeferredCall(_call_busy, (state, below, *args))
    return dispatch.DeferredCall(_add_up_loss, (state, operator, given))


def _call_busy(state: shards.Shard, below: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with shards.busy(state):
        return below(*args, **kwargs)


def _shape_of_terms(name: str, given: dict[str, Any]) -> Sequence[int]:
    inputs, target = given["self"], given["target"]
    if name not in _BY_CLASS:
        return tuple(torch.broadcast_shapes(inputs.shape, target.shape))
    if not target.is_floating_point():
        return tuple(target.shape)
    return (*inputs.shape[:1], *inputs.shape[2:]) if inputs.dim() > 1 else ()


def _add_up_terms(
    state: shards.Shard, terms: torch.Tensor, is_mean: bool, dtype: torch.dtype | None
) -> torch.Tensor:
    with shards.busy(state):
        terms = terms if dtype is None else terms.to(dtype)
        return _sum_over_samples(state, terms, _number(terms) if is_mean else None)


def _add_up_loss(state: shards.Shard, operator: Any, given: dict[str, Any]) -> torch.Tensor:
    with shards.busy(state):
        terms = operator(*{**given, "reduction": _NONE}.values())
        count = None
        if given["reduction"] == _MEAN:
            is_by_class = "ignore_index" in given and not given["target"].is_floating_point()
            count = _sum_weights(state, given) if is_by_class else _number(terms)
        return _sum_over_samples(state, terms, count)


def _number(terms: torch.Tensor) -> torch.Tensor:
    return torch.full((), terms.numel(), dtype=torch.float64, device=terms.device)


def _sum_weights(state: shards.Shard, given: dict[str, Any]) -> torch.Tensor:
    """Return the sum of the weights of targets, which are classes."""
    target: torch.Tensor = given["target"]
    weight: torch.Tensor | None = given["weight"]
    is_counted = target != given["ignore_index"]
    weights = is_counted.double()
    if weight is not None:
        weights *= weight.detach().double()[torch.where(is_counted, target, 0).long()]
    state.note_terms(weights)
    total: torch.Tensor = weights.sum()
    return total


def _sum_over_samples(
    state: shards.Shard, terms: torch.Tensor, count: torch.Tensor | None
) -> torch.Tensor:
    """Return the sum of the terms of all ranks.

    Args:
        state: the shard.
        terms: of the shard.
        count: by whose sum over all ranks the result is divided; ``None``: by nothing.
    """
    state.note_terms(terms)
    if not terms.is_floating_point():
        (whole,) = state.sum_terms([terms.sum()])
        return whole
    # The sums of all ranks are rounded once, as one process rounds its own.
    total: torch.Tensor = _SumOverSamples.apply(state, terms.sum(dtype=torch.float64), count)
    return total.to(terms.dtype)


class _SumOverSamples(torch.autograd.Function):
    """The sum over all ranks of what they have added up, over the sum of their counts."""

    @staticmethod
    def forward(
        ctx: Any, state: shards.Shard, own: torch.Tensor, count: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the sum, or the mean."""
        ctx.state = state
        parts = [own] if count is None else [own, count]
        total, *divisors = state.sum_terms([torch.stack(parts)])[0]
        ctx.divisor = divisors[0] if divisors else None
        result: torch.Tensor = total / ctx.divisor if divisors else total.clone()
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of what this rank has added up: gradients inside of a shard are those
        of one process times the number of ranks."""
        if shards.current() is not None:
            raise UnshareableError("computes gradients of sums over samples in its forward pass")
        if ctx.state.graph is not None:
            ctx.state.graph.enter()
        gradient = gradient if ctx.divisor is None else gradient / ctx.divisor
        (whole,) = sum_over_ranks(ctx.state.sum_gradients, gradient)
        return None, whole, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: shards.SumOverRanks, *parts: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.function = function
        return tuple(function([part.detach().clone() for part in parts]))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *sum_over_ranks(ctx.function, *gradients)


def sum_over_ranks(function: shards.SumOverRanks, *parts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return differentiable sums of tensors over all ranks. Their backward is such a sum too, since
    what a rank adds is used on all of them.

    Args:
        function: adds up.
        parts: of this rank.
    """
    apply: Any = _SumOverRanks.apply
    found: tuple[torch.Tensor, ...] = apply(function, *parts)
    return found


def is_sum(node: Any) -> bool:
    """Whether a node of an autograd graph is a sum over samples of all ranks."""
    node_type: Any = _SumOverSamples
    return isinstance(node, node_type._backward_cls)
