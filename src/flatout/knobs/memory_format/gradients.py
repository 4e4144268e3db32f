"""Gradients in the layout of the activations that they belong to.

A model that ends in ``flatten`` hands gradients in rows back to activations with their channels
side by side; other gaps are the other way round. On the CPU, torch's backward kernels walk through
two layouts element by element. With a copy of the gradient beforehand, and that included, that of a
ReLU is 6.9 (5.1 to 9.3, 8 pairs) times as fast in float32, 9.4 (8.9 to 9.9, 8 pairs) in bfloat16
(``python benchmarks/kernels.py layouts --pairs 8``, on a Zen 5). One copy, at the first such
operator, is all it takes: what comes out of that is in the layout of the activations again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

BACKWARD = (
    *("threshold_backward", "leaky_relu_backward", "hardtanh_backward", "hardswish_backward"),
    *("silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward"),
    "native_batch_norm_backward",
)
"""Operators whose first two arguments are a gradient and the activations that it belongs to."""


def keep_layouts(on_failure: OnFailure) -> Undo:
    """Let these operators get gradients in the layout of the activations; returns the undo.

    Args:
        on_failure: told when something here failed; torch's own kernel got the gradient as it was.
    """

    def in_layout(
        below: Callable[..., Any],
        gradient: torch.Tensor,
        activations: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> dispatch.DeferredCall | None:
        found = _like(gradient, activations)
        if found is gradient:
            return None
        return dispatch.DeferredCall(below, (found, activations, *args), kwargs)

    return dispatch.override_operators(
        dict.fromkeys(BACKWARD, in_layout), "CPU", on_failure=on_failure
    )


def _like(gradient: torch.Tensor, activations: torch.Tensor) -> torch.Tensor:
    if gradient.dim() != 4 or gradient.stride() == activations.stride():
        return gradient
    for layout in (torch.contiguous_format, torch.channels_last):
        if activations.is_contiguous(memory_format=layout):
            return gradient.contiguous(memory_format=layout)
    return gradient
