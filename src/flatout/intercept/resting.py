"""Overrides of operators that rest while the program only makes calls that they leave to torch.

The way from torch's dispatcher into Python and back takes some 15 microseconds, more than a small
operator itself. A program may make thousands of such calls between two steps, without gradients and
with a batch of one (the rollouts of reinforcement learning). So an operator whose overrides
have handled nothing in several outermost module calls in a row is given back to torch at the next
one, when no kernel runs, and overridden again at the next optimizer step. Both are moments of the
program, not of the clock: the same program always gets the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flatout.intercept import dispatch

if TYPE_CHECKING:
    from flatout.intercept.callbacks import CallbackList, ForwardWrapper, OptimizerCallback


IDLE_CALLS = 8
"""An operator may rest after this many outermost module calls in a row, without gradients, in which
none of its overrides has handled a call. Between two optimizer steps, so many calls are slower."""


class RestingOperators:
    """Lets overridden operators rest.

    Args:
        forward_wrappers, before_optimizer_step: the callbacks of the host.
        optimizer_exists: whether the program has built an optimizer. Without one, nothing would end
            the rest.
    """

    def __init__(
        self,
        forward_wrappers: CallbackList[ForwardWrapper],
        before_optimizer_step: CallbackList[OptimizerCallback],
        optimizer_exists: Callable[[], bool],
    ) -> None:
        self._forward_wrappers = forward_wrappers
        self._before_optimizer_step = before_optimizer_step
        self._optimizer_exists = optimizer_exists
        self._candidates: list[dispatch.OverriddenOperator] = []
        self._resting: list[dispatch.OverriddenOperator] = []

    def ask(self, operator: dispatch.OverriddenOperator) -> None:
        """Let an operator rest once it has been idle for long enough."""
        if operator not in self._candidates and self._optimizer_exists():
            if not self._candidates:
                self._forward_wrappers.append(self._count)
            self._candidates.append(operator)

    def _count(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        for operator in tuple(self._candidates):
            operator.idle_calls += not torch.is_grad_enabled()
            if operator.idle_calls > IDLE_CALLS or not operator.overrides:
                self._candidates.remove(operator)
                self._let_rest(operator)
        if not self._candidates:
            self._forward_wrappers.remove(self._count)
        return call(module, *args, **kwargs)

    def _let_rest(self, operator: dispatch.OverriddenOperator) -> None:
        if not self._resting:
            self._before_optimizer_step.append(self._wake)
        self._resting.append(operator)
        operator.rest()

    def _wake(self, optimizer: Any) -> None:
        self._before_optimizer_step.remove(self._wake)
        while self._resting:
            self._resting.pop().wake()
