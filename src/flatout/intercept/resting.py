"""Overrides of operators that rest while the program only makes calls that they leave to torch.

The way from torch's dispatcher into Python and back takes some 15 microseconds, more than a small
operator itself. A program may make thousands of such calls between two steps, without gradients and
with a batch of one (the rollouts of reinforcement learning). So an override that has handled none
of many such calls in a row is taken out at the next outermost module call, when no kernel runs, and
put back at the next optimizer step. Both are moments of the program, not of the clock: the same
program always gets the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.intercept import dispatch

if TYPE_CHECKING:
    from flatout.intercept.callbacks import CallbackList, ForwardWrapper, OptimizerCallback


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
        self._operators: list[dispatch.OverriddenOperator] = []

    def ask(self, operator: dispatch.OverriddenOperator) -> None:
        """Let an operator rest from the next outermost module call on."""
        if self._optimizer_exists() and operator not in self._operators:
            self._operators.append(operator)
            self._forward_wrappers.remove(self._rest)
            self._forward_wrappers.append(self._rest)

    def _rest(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._forward_wrappers.remove(self._rest)
        self._before_optimizer_step.remove(self._wake)
        self._before_optimizer_step.append(self._wake)
        for operator in self._operators:
            operator.rest()
        return call(module, *args, **kwargs)

    def _wake(self, optimizer: Any) -> None:
        self._before_optimizer_step.remove(self._wake)
        while self._operators:
            self._operators.pop().wake()
