"""Loss scaling for float16: small gradients must not vanish, too large ones not reach the weights.

The rule is that of ``torch.amp.GradScaler`` (Micikevicius et al., Mixed Precision Training, ICLR
2018, https://arxiv.org/abs/1710.03740): backward starts from the loss times a scale; a step whose
gradients are not finite is left out and halves the scale; after ``GROWTH_INTERVAL`` good ones it
doubles. Unlike there, the scale does not fall without end: below 1 the knob is turned back. A
program that knows nothing of it reads ``.grad`` between backward and step (to clip, to accumulate),
so every gradient is divided by the scale before ``backward`` returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent import graph
from flatout.agent.capture import is_capturing
from flatout.agent.finite import Withheld, unscale

if TYPE_CHECKING:
    from flatout.agent.session import Session

_autograd: Any = torch.autograd

INITIAL_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""The defaults of ``torch.amp.GradScaler``."""

LEAST_SCALE = 1.0
"""Below it the scale is not what makes gradients overflow, and steps would be left out for good."""

INSPECTED = 3
"""Backward calls at the beginning whose graph is searched for leaves that are not known."""


class LossScaling:
    """Takes the place of the function through which every backward call goes.

    Args:
        session: of this process.
        knob: name under which it speaks in the record.

    Attributes:
        scale: by which the gradient of the loss is multiplied now.
        is_wanted: whether backward is to be scaled; off until something has run in float16.
    """

    def __init__(self, session: Session, knob: str) -> None:
        self.scale = INITIAL_SCALE
        self.is_wanted = False
        self._session = session
        self._knob = knob
        self._own: Any = _autograd._engine_run_backward
        self._good_steps = 0
        self._inspections = 0
        self._found: weakref.WeakKeyDictionary[Any, list[torch.Tensor]] = (
            weakref.WeakKeyDictionary()
        )
        self._withheld = Withheld()
        self._stepping: Any = None

    def install(self) -> None:
        """Begin."""
        self._installed = self._backward
        _autograd._engine_run_backward = self._installed

    def remove(self) -> None:
        """Put back what was there, unless the program has put something else there meanwhile."""
        self._withheld.show()
        self.is_wanted = False
        if _autograd._engine_run_backward is self._installed:
            _autograd._engine_run_backward = self._own

    # Backward

    def _backward(self, outputs: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
        creates_graph = len(args) > 1 and args[1]
        is_left_alone = creates_graph or is_capturing()
        if not self.is_wanted or not kwargs.get("accumulate_grad") or is_left_alone:
            return self._own(outputs, grads, *args, **kwargs)
        if self._inspections < INSPECTED:
            self._inspections += 1
            why = self._unsuitable(outputs)
            if why is not None:
                self.is_wanted = False
                self._session.turn_back(self._knob, RuntimeError(why))
                return self._own(outputs, grads, *args, **kwargs)
        parameters = [p for group in self._groups() for p in group[1]]
        accumulated = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            scaled = tuple(None if g is None else g * self.scale for g in grads)
            result = self._own(outputs, scaled, *args, **kwargs)
        except BaseException:
            for parameter, before in zip(parameters, accumulated, strict=True):
                parameter.grad = before
            raise
        for optimizer, members in self._groups():
            found = unscale([p.grad for p in members if p.grad is not None], 1 / self.scale)
            if optimizer is not None:
                self._found.setdefault(optimizer, []).extend(found)
        for parameter, before in zip(parameters, accumulated, strict=True):
            if parameter.grad is None:
                parameter.grad = before
            elif before is not None:
                parameter.grad = before + parameter.grad
        if self._stepping is not None:  # a closure: the update follows at once
            self._hide_unless_finite(self._stepping)
        return result

    def _groups(self) -> Iterator[tuple[Any, list[torch.Tensor]]]:
        """Each optimizer with its parameters; under ``None`` those of modules that have none."""
        seen: set[int] = set()
        for optimizer in self._session.optimizers:
            members = [
                p for group in optimizer.param_groups for p in group["params"] if id(p) not in seen
            ]
            seen.update(map(id, members))
            yield optimizer, members
        rest = {id(p): p for root in self._session.roots for p in root.parameters()}
        yield None, [p for identity, p in rest.items() if identity not in seen]

    def _unsuitable(self, outputs: Any) -> str | None:
        """Why gradients would be scaled that cannot be divided again, ``None`` if none would."""
        if not self._session.optimizers and not self._session.hooks.optimizer_exists:
            return (
                "no optimizer steps: a step with gradients that are not finite cannot be left out"
            )
        known = {id(p): p for _, members in self._groups() for p in members}
        if any(p._post_accumulate_grad_hooks for p in known.values()):
            return "gradients are used while backward runs"
        leaves = (graph.leaf_of(node) for node, _ in graph.edges(outputs) if node is not None)
        if any(leaf is not None and id(leaf) not in known for leaf in leaves):
            return "the gradient goes to tensors that belong to no module and no optimizer"
        return None

    # The step

    def before(self, optimizer: Any) -> None:
        """An optimizer is about to step: without its gradients, if they are not finite."""
        self._withheld.show()  # after a step that was left by an exception
        self._stepping = optimizer
        self._hide_unless_finite(optimizer)

    def after(self, optimizer: Any) -> None:
        """It has stepped."""
        self._stepping = None
        self._withheld.show()

    def _hide_unless_finite(self, optimizer: Any) -> None:
        found = self._found.pop(optimizer, [])
        if not found:
            return
        if not any(bool(flag) for flag in found):
            self._session.checked_gradients.add(optimizer)
            self._good_steps += 1
            if self._good_steps == GROWTH_INTERVAL:
                self._good_steps = 0
                self.scale *= GROWTH
            return
        self._good_steps = 0
        self.scale *= BACKOFF
        if self.scale < LEAST_SCALE:
            self.is_wanted = False
            why = f"the gradients of {type(optimizer).__qualname__} are not finite at any scale"
            self._session.turn_back(self._knob, ArithmeticError(why))
            return
        self._session.event(
            "noticed",
            self._knob,
            f"a step of {type(optimizer).__qualname__} left out, its gradients are not finite; "
            f"loss scale {self.scale:g}",
        )
        self._withheld.hide(optimizer)
