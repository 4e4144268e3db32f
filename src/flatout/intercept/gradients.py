"""Reading the gradients of parameters, and hiding them from an optimizer step."""

from __future__ import annotations

from typing import Any

import torch

stored_gradient: Any = torch._C.TensorBase.grad
"""Torch's descriptor of ``Tensor.grad``. With ``gradients=on_demand``, reading ``Parameter.grad``
computes a deferred gradient; code that only observes uses this descriptor instead."""


def collect_gradients(optimizer: Any) -> list[torch.Tensor]:
    """Return the gradients that the next step of an optimizer would use."""
    return [
        grad
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (grad := parameter.grad) is not None
    ]


class HiddenGradients:
    """Gradients that are hidden from an optimizer step, so that the step skips their parameters."""

    def __init__(self) -> None:
        self._hidden: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hide(self, optimizer: Any) -> None:
        """Hide the gradients of all parameters of an optimizer."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._hidden.append((parameter, parameter.grad))
                    parameter.grad = None

    def show(self) -> None:
        """Restore the hidden gradients, except where there are newer ones."""
        for parameter, grad in reversed(self._hidden):
            if parameter.grad is None:
                parameter.grad = grad
        self._hidden.clear()
