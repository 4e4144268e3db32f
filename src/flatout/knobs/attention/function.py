"""Attention as one node of the autograd graph, independent of how its values are computed."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.knobs.attention.kernel import ALWAYS, Kernel, Options


class Implementation(NamedTuple):
    """A way to compute the values and gradients of attention.

    Attributes:
        outputs: takes query, key, value, bias (see ``Options.blocks``), options and kernel, and
            returns the output, the logarithm of the sum of each row of exponentials, and further
            tensors that ``gradients`` needs.
        gradients: takes query, key, value, bias, what ``outputs`` returned, the gradient of the
            output, options and kernel, and returns the gradients of query, key and value.
    """

    outputs: Callable[..., tuple[torch.Tensor, ...]]
    gradients: Callable[..., Iterable[torch.Tensor]]


class Attention(dispatch.RecordedFunction):
    """Softmax of the scaled scores, dropout, and the matmul with the values.

    It saves its inputs, its output, one number per row, and, where heads are computed as a whole,
    one bit for each probability that may be dropped.
    """


class AttentionBackward(NamedTuple):
    """Computes the gradients of attention; see ``dispatch.GradientRule``.

    Attributes:
        options: the options of the attention.
        kernel: the compiled kernel.
        implementation: how values and gradients are computed.
        on_failure: called with the exception if ``gradients`` fails.
    """

    options: Options
    kernel: Kernel
    implementation: Implementation
    on_failure: OnFailure

    def gradients(
        self,
        saved: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
        gradient: torch.Tensor,
    ) -> Iterable[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        gradient = _reshape_like_output(saved, gradient)
        return self.implementation.gradients(*saved, gradient, self.options, self.kernel)

    def fallback_gradients(
        self, saved: Sequence[Any], needed: Sequence[bool], gradient: torch.Tensor
    ) -> Iterable[torch.Tensor | None]:
        """See ``dispatch.GradientRule``."""
        *inputs, bias, output = saved[:5]
        create_graph = torch.is_grad_enabled()
        if not create_graph:
            inputs = [x.detach().requires_grad_() for x in inputs]
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            query, key, value = (x.flatten(0, -3) for x in inputs)
            recomputed = compute_with_torch(query, key, value, bias, self.options, self.kernel)
            gradients = torch.autograd.grad(
                recomputed.view(output.shape),
                list(itertools.compress(inputs, needed)),
                _reshape_like_output(saved, gradient),
                create_graph=create_graph,
            )
        remaining = iter(gradients)
        return [next(remaining) if is_needed else None for is_needed in needed]


def _reshape_like_output(saved: Sequence[Any], gradient: torch.Tensor) -> torch.Tensor:
    """The gradient in the shape in which the implementation returned the output."""
    output: torch.Tensor = saved[4]
    return gradient.reshape(output.shape)


def compute_with_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    options: Options,
    kernel: Kernel,
) -> torch.Tensor:
    """Compute attention with torch's operators, so that autograd can record them.

    The random numbers are those of the kernel. The whole matrix of probabilities is stored.

    Args:
        query: heads x rows x width.
        key: heads x columns x width.
        value: heads x columns x another width.
        bias: see ``Options.blocks``.
        options: the options of the attention.
        kernel: the compiled kernel, for its random numbers.
    """
    scores = query @ key.mT * options.scale
    heads, rows, columns = scores.shape
    if bias is not None:
        batch = heads // options.heads_per_batch
        full = bias.expand(batch, options.heads_per_batch, rows, columns)
        scores = scores + full.reshape(heads, rows, columns)
    if options.is_causal:
        unseen = torch.ones(rows, columns, dtype=torch.bool, device="cpu").triu(1)
        scores = scores.masked_fill(unseen, -math.inf)
    is_all_masked = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = scores.masked_fill(is_all_masked, 0.0).softmax(-1)
    probabilities = probabilities.masked_fill(is_all_masked, 0.0)
    if options.keep < ALWAYS:
        factors = torch.empty(heads, rows, columns, dtype=torch.float32, device="cpu")
        block = next(options.blocks(slice(0, heads), query, key, None))[0]
        block.rows, block.columns = rows, columns
        kernel.dropout_factors(ctypes.addressof(block), factors.data_ptr())
        probabilities = probabilities * factors
    return probabilities.to(value.dtype) @ value
