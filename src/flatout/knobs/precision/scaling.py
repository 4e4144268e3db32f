"""Loss scaling for float16: small gradients must not vanish, too large ones not reach the weights.

The rule is that of ``torch.amp.GradScaler`` (Micikevicius et al., Mixed Precision Training, ICLR
2018, https://arxiv.org/abs/1710.03740): backward starts from the loss times a scale; a step whose
gradients are not finite is left out and halves the scale; after ``GROWTH_INTERVAL`` good ones it
doubles. Unlike there, the scale does not fall without end: below 1 the knob is turned back. A
program that knows nothing of it reads ``.grad`` (to clip, to accumulate), or lets it be a part of
some larger memory. So what is divided by the scale is not ``.grad``, but what a backward call is
about to add to it: each time once, before anything of the program's sees it.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from flatout.intercept import graph, objects
from flatout.intercept.containment import wrap
from flatout.intercept.finite import HiddenGradients, are_finite, gradients
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.patch import Undo, add_attribute, wrap_function

if TYPE_CHECKING:
    from flatout.intercept.host import Host

INITIAL_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""The defaults of ``torch.amp.GradScaler``."""

LEAST_SCALE = 1.0
"""Below it the scale is not what makes gradients overflow, and steps would be left out for good."""

INSPECTED = 3
"""Backward calls at the beginning whose graph is searched for leaves that are not known."""


class LossScaling:
    """Wraps backward calls and optimizer steps.

    Args:
        host: of this process.
        knob: name under which it speaks in the record.

    Attributes:
        scale: by which the gradient of the loss is multiplied now.
        is_wanted: whether backward is to be scaled; off until something has run in float16.
    """

    def __init__(self, host: Host, knob: str) -> None:
        self.scale = INITIAL_SCALE
        self.is_wanted = False
        self._host = host
        self._knob = knob
        self._good_steps = 0
        self._inspections = 0
        self._unchecked: WeakIdentitySet[Any] = WeakIdentitySet()
        self._withheld = HiddenGradients()
        self._stepping: Any = None

    def install(self) -> Undo:
        """Begin."""
        tensor: Any = torch.Tensor
        retain_grad = wrap(self._has_failed, self._look_on, tensor.retain_grad)
        with contextlib.ExitStack() as undo:
            undo.callback(self._host.before_optimizer_step.append(self._before))
            undo.callback(self._host.after_optimizer_step.append(self._after))
            undo.callback(self._host.backward_wrappers.append(self._backward, self._has_failed))
            undo.callback(wrap_function(tensor, "register_hook", self._has_failed, self._look_on))
            undo.callback(add_attribute(tensor, "retain_grad", retain_grad))
            undo.callback(self._stop)
            return undo.pop_all().close

    def _stop(self) -> None:
        self._withheld.show()
        self.is_wanted = False

    def refuse(self, why: str) -> None:
        """Scale no more, and turn the knob back."""
        self.is_wanted = False
        self._host.applied.withdraw(self._knob, RuntimeError(why))

    def _has_failed(self, error: Exception) -> None:
        self.is_wanted = False
        self._host.applied.withdraw(self._knob, error)

    def _look_on(self, own: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """In the place of a method of tensors by which a program sees gradients on their way."""
        if self.is_wanted and not tensor.is_leaf:
            self.refuse("the program sees gradients on their way through the graph")
        return own(tensor, *args, **kwargs)

    # Backward

    def _backward(
        self, own: Callable[..., Any], outputs: Any, grads: Any, *args: Any, **kwargs: Any
    ) -> Any:
        creates_graph = len(args) > 1 and args[1]
        if not self.is_wanted or not kwargs.get("accumulate_grad") or creates_graph:
            return own(outputs, grads, *args, **kwargs)
        parameters = [p for _, members in self._groups() for p in members if p.requires_grad]
        inputs = args[2] if len(args) > 2 else ()
        if inputs and not {id(x) for x in inputs} <= set(map(id, parameters)):
            return own(outputs, grads, *args, **kwargs)
        if self._inspections < INSPECTED:
            self._inspections += 1
            why = self._unsuitable(outputs)
            if why is not None:
                self.refuse(why)
                return own(outputs, grads, *args, **kwargs)
        scaled = tuple(None if g is None else g * self.scale for g in grads)
        with _divided(parameters, self.scale):
            result = own(outputs, scaled, *args, **kwargs)
        for optimizer in self._host.optimizers:
            self._unchecked.add(optimizer)
        if self._stepping is not None:  # a closure: the update follows at once
            self._unchecked.add(self._stepping)
            self._hide_unless_finite(self._stepping)
        return result

    def _groups(self) -> Iterator[tuple[Any, list[torch.Tensor]]]:
        """Each optimizer with its parameters; under ``None`` those of modules that have none."""
        seen: set[int] = set()
        for optimizer in self._host.optimizers:
            members = [
                p for group in optimizer.param_groups for p in group["params"] if id(p) not in seen
            ]
            seen.update(map(id, members))
            yield optimizer, members
        rest = {id(p): p for root in self._host.roots for p in objects.parameters(root)}
        yield None, [p for identity, p in rest.items() if identity not in seen]

    def _unsuitable(self, outputs: Any) -> str | None:
        """Why gradients would be scaled that cannot be divided again, ``None`` if none would."""
        if not self._host.optimizers and not self._host.hooks.optimizer_exists:
            return (
                "no optimizer steps: a step with gradients that are not finite cannot be left out"
            )
        known = {id(p): p for _, members in self._groups() for p in members}
        if any(p._post_accumulate_grad_hooks for p in known.values()):
            return "gradients are used while backward runs"
        for node, _ in graph.edges(outputs):
            leaf = None if node is None else graph.leaf_of(node)
            if leaf is not None and id(leaf) not in known:
                return "the gradient goes to tensors that belong to no module and no optimizer"
            function = getattr(node, "_forward_cls", None)
            if function is not None and not function.__module__.startswith("torch."):
                return f"{function.__qualname__} computes gradients itself"
        return None

    # The step

    def _before(self, optimizer: Any) -> None:
        """An optimizer is about to step: without its gradients, if they are not finite."""
        self._withheld.show()  # after a step that was left by an exception
        self._stepping = optimizer
        self._hide_unless_finite(optimizer)

    def _after(self, optimizer: Any) -> None:
        """It has stepped."""
        self._stepping = None
        self._withheld.show()

    def _hide_unless_finite(self, optimizer: Any) -> None:
        if optimizer not in self._unchecked:
            return
        self._unchecked.discard(optimizer)
        if are_finite(gradients(optimizer)):
            self._host.checked_gradients.add(optimizer)
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
            self._host.applied.withdraw(self._knob, ArithmeticError(why))
            return
        self._host.events.add(
            "noticed",
            self._knob,
            f"a step of {type(optimizer).__qualname__} left out, its gradients are not finite; "
            f"loss scale {self.scale:g}",
        )
        self._withheld.hide(optimizer)


@contextlib.contextmanager
def _divided(parameters: Iterable[torch.Tensor], scale: float) -> Iterator[None]:
    """What is added to gradients in here is divided by ``scale`` before it meets a hook.

    Not in place: the same memory may be added to the gradient of another parameter as well.
    """
    # Not a function of ours, which could fail while autograd runs.
    divided: Any = functools.partial(torch.mul, other=1 / scale)
    changed = []
    try:
        for parameter in parameters:
            hooks: Any = parameter._backward_hooks
            if hooks is None:
                parameter._backward_hooks = hooks = OrderedDict()
            # Torch calls them in the order of the plain dict below, in which nothing can be moved.
            others = list(hooks.items())
            hooks.clear()
            hooks[id(divided)] = divided
            hooks.update(others)
            changed.append((parameter, hooks))
        yield
    finally:
        for parameter, hooks in changed:
            hooks.pop(id(divided), None)
            if not hooks:
                parameter._backward_hooks = None
