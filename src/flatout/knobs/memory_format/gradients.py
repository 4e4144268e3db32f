"""Convert gradients to the memory format of the activations that they belong to.

A model that ends in ``flatten`` passes contiguous gradients back to channels_last activations;
elsewhere it is the other way round. On the CPU, torch's backward kernels then process one element
after the other. Converting the gradient first makes the backward pass of a ReLU 6.9 times as fast
(5.1 to 9.3, 8 pairs) in float32 and 9.4 times (8.9 to 9.9, 8 pairs) in bfloat16, the conversion
included (``python benchmarks/kernels.py layouts --pairs 8``, on a Zen 5). One conversion at the
first such operator is enough, because its result has the memory format of the activations again.
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


def convert_gradients(on_failure: OnFailure) -> Undo:
    """Convert the gradients that these operators get; returns the undo.

    Args:
        on_failure: called with the exception if a conversion fails; torch's kernel then gets the
            gradient unconverted.
    """

    def convert(
        torch_kernel: Callable[..., Any],
        gradient: torch.Tensor,
        activations: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> dispatch.DeferredCall | None:
        converted = _to_format_of(activations, gradient)
        if converted is gradient:
            return None
        return dispatch.DeferredCall(torch_kernel, (converted, activations, *args), kwargs)

    return dispatch.override_operators(
        dict.fromkeys(BACKWARD, convert), "CPU", on_failure=on_failure
    )


def _to_format_of(activations: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    if gradient.dim() != 4 or gradient.stride() == activations.stride():
        return gradient
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if activations.is_contiguous(memory_format=memory_format):
            return gradient.contiguous(memory_format=memory_format)
    return gradient
