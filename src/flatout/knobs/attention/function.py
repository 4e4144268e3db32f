"""Attention as one function of autograd, whichever way its values are computed."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.knobs.attention.kernel import ALWAYS, Job, Kernel


class Way(NamedTuple):
    """How values are computed.

    Attributes:
        outputs: of query, key, value, ``Job.blocks``' bias, job and kernel: the output, the
            logarithm of the sum of each row of scores, and whatever else ``gradients`` wants.
        gradients: of query, key and value, given these, the bias, what ``outputs`` gave, the
            gradient of the output, job and kernel.
    """

    outputs: Callable[..., tuple[torch.Tensor, ...]]
    gradients: Callable[..., Iterable[torch.Tensor]]


class Attention(dispatch.RecordedFunction):
    """Softmax of scaled products, dropout, and the product with the values.

    Saved for the backward pass: what came in, what went out, one number a row, and, where heads go
    through as a whole, a bit for each probability that may be dropped.
    """


class Attending(NamedTuple):
    """See ``dispatch.GradientRule``.

    Attributes:
        job: what is asked for.
        kernel: the compiled part.
        how: values are computed.
        on_failure: told of a failure.
    """

    job: Job
    kernel: Kernel
    how: Way
    on_failure: OnFailure

    def gradients(
        self,
        saved: Sequence[torch.Tensor | None],
        needed: Sequence[bool],
        gradient: torch.Tensor,
    ) -> Iterable[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        gradient = _of_output(saved, gradient)
        return self.how.gradients(*saved, gradient, self.job, self.kernel)

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
            again = differentiable(query, key, value, bias, self.job, self.kernel)
            found = torch.autograd.grad(
                again.view(output.shape),
                list(itertools.compress(inputs, needed)),
                _of_output(saved, gradient),
                create_graph=create_graph,
            )
        each = iter(found)
        return [next(each) if is_needed else None for is_needed in needed]


def _of_output(saved: Sequence[Any], gradient: torch.Tensor) -> torch.Tensor:
    """The gradient, in the shape that the output has to the way."""
    output: torch.Tensor = saved[4]
    return gradient.reshape(output.shape)


def differentiable(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    job: Job,
    kernel: Kernel,
) -> torch.Tensor:
    """The same in operations of torch, with the same random numbers; the matrix is stored."""
    scores = query @ key.mT * job.scale
    heads, rows, columns = scores.shape
    if bias is not None:
        batch = heads // job.heads_per_batch
        full = bias.expand(batch, job.heads_per_batch, rows, columns)
        scores = scores + full.reshape(heads, rows, columns)
    if job.is_causal:
        unseen = torch.ones(rows, columns, dtype=torch.bool, device="cpu").triu(1)
        scores = scores.masked_fill(unseen, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    probabilities = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    if job.keep < ALWAYS:
        factors = torch.empty(heads, rows, columns, dtype=torch.float32, device="cpu")
        block = next(job.blocks(slice(0, heads), query, key, None))[0]
        block.rows, block.columns = rows, columns
        kernel.dropout_factors(ctypes.addressof(block), factors.data_ptr())
        probabilities = probabilities * factors
    return probabilities.to(value.dtype) @ value
