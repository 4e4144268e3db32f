"""Loss scaling for float16, so that small gradients do not underflow.

The rule is that of ``torch.amp.GradScaler`` (Micikevicius et al., Mixed Precision Training, ICLR
2018, https://arxiv.org/abs/1710.03740): backward starts from the loss times a scale; a step whose
gradients are not finite is skipped and halves the scale; after ``GROWTH_INTERVAL`` finite steps the
scale doubles. There are two differences. The scale does not fall forever: below 1 the knob is
withdrawn. And ``.grad`` is never scaled, because the program, which does not know of the scaling,
may read it (to clip or accumulate) or share its memory. Instead, each gradient is divided by the
scale just before a backward call accumulates it into ``.grad``, and before any hook of the program.
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
from flatout.intercept.finite import are_finite
from flatout.intercept.gradients import HiddenGradients, collect_gradients
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.patch import Undo, add_attribute, wrap_function

if TYPE_CHECKING:
    from flatout.intercept.host import Host

INITIAL_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**16, 2.0, 0.5, 2000
"""The defaults of ``torch.amp.GradScaler``."""

LEAST_SCALE = 1.0
"""Below this, the scale is not what makes gradients overflow, and every step would be skipped."""

INSPECTED = 3
"""The number of backward calls, from the first one, whose graph is checked for unknown leaves."""


class LossScaling:
    """Scales backward calls, and skips optimizer steps whose gradients are not finite.

    Args:
        host: the process that is tuned.
        knob: the name of the knob, for the record.

    Attributes:
        scale: the present factor of the loss.
        is_wanted: whether to scale backward calls; ``False`` until a module has run in float16.
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
        """Wrap backward calls and optimizer steps; returns the undo."""
        tensor: Any = torch.Tensor
        failed, check = self._withdraw, self._check_hooked
        retain_grad = wrap(failed, check, tensor.retain_grad)
        with contextlib.ExitStack() as undo:
            undo.callback(self._host.before_optimizer_step.append(self._before_step))
            undo.callback(self._host.after_optimizer_step.append(self._after_step))
            undo.callback(self._host.backward_wrappers.append(self._backward, failed))
            undo.callback(wrap_function(tensor, "register_hook", failed, check))
            undo.callback(add_attribute(tensor, "retain_grad", retain_grad))
            undo.callback(self._stop)
            return undo.pop_all().close

    def _stop(self) -> None:
        self._withheld.show()
        self.is_wanted = False

    def refuse(self, why: str) -> None:
        """Stop scaling and withdraw the knob."""
        self._withdraw(RuntimeError(why))

    def _withdraw(self, error: Exception) -> None:
        self.is_wanted = False
        self._host.applied.withdraw(self._knob, error)

    def _check_hooked(
        self, original: Callable[..., Any], tensor: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Replaces a method of tensors by which a program sees gradients inside the graph."""
        if self.is_wanted and not tensor.is_leaf:
            self.refuse("the program sees scaled gradients inside the graph")
        return original(tensor, *args, **kwargs)

    # Backward

    def _backward(
        self, original: Callable[..., Any], outputs: Any, grads: Any, *args: Any, **kwargs: Any
    ) -> Any:
        creates_graph = len(args) > 1 and args[1]
        if not self.is_wanted or not kwargs.get("accumulate_grad") or creates_graph:
            return original(outputs, grads, *args, **kwargs)
        parameters = [p for p in self._parameters() if p.requires_grad]
        inputs = args[2] if len(args) > 2 else ()
        if inputs and not {id(x) for x in inputs} <= set(map(id, parameters)):
            return original(outputs, grads, *args, **kwargs)
        if self._inspections < INSPECTED:
            self._inspections += 1
            why = self._refusal(outputs)
            if why is not None:
                self.refuse(why)
                return original(outputs, grads, *args, **kwargs)
        scaled_grads = tuple(None if g is None else g * self.scale for g in grads)
        with _dividing(parameters, self.scale):
            result = original(outputs, scaled_grads, *args, **kwargs)
        for optimizer in self._host.optimizers:
            self._unchecked.add(optimizer)
        if self._stepping is not None:  # backward runs in a closure, so the update follows at once
            self._unchecked.add(self._stepping)
            self._hide_unless_finite(self._stepping)
        return result

    def _parameters(self) -> list[torch.Tensor]:
        """The parameters of all optimizers and of all outermost modules, each once."""
        parameters = {
            id(p): p
            for optimizer in self._host.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for root in self._host.roots:
            for p in objects.parameters(root):
                parameters.setdefault(id(p), p)
        return list(parameters.values())

    def _refusal(self, outputs: Any) -> str | None:
        """Why scaled gradients could not be divided by the scale again, ``None`` if they can."""
        if not self._host.optimizers and not self._host.hooks.optimizer_exists:
            return (
                "no optimizer steps, so a step with gradients that are not finite cannot be skipped"
            )
        known = {id(p): p for p in self._parameters()}
        if any(p._post_accumulate_grad_hooks for p in known.values()):
            return "gradients are used while backward runs"
        for node, _ in graph.edges(outputs):
            leaf = None if node is None else graph.leaf_of(node)
            if leaf is not None and id(leaf) not in known:
                return "a gradient goes to a tensor that belongs to no module and no optimizer"
            function = getattr(node, "_forward_cls", None)
            if function is not None and not function.__module__.startswith("torch."):
                return f"{function.__qualname__} computes gradients itself"
        return None

    # Optimizer steps

    def _before_step(self, optimizer: Any) -> None:
        """Hide the gradients of an optimizer that is about to step, if they are not finite."""
        self._withheld.show()  # the last step may have been left by an exception
        self._stepping = optimizer
        self._hide_unless_finite(optimizer)

    def _after_step(self, optimizer: Any) -> None:
        """Show the gradients again after the step."""
        self._stepping = None
        self._withheld.show()

    def _hide_unless_finite(self, optimizer: Any) -> None:
        if optimizer not in self._unchecked:
            return
        self._unchecked.discard(optimizer)
        if are_finite(collect_gradients(optimizer)):
            self._host.optimizers_with_finite_gradients.add(optimizer)
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
            f"a step of {type(optimizer).__qualname__} is skipped, its gradients are not finite; "
            f"the loss scale is now {self.scale:g}",
        )
        self._withheld.hide(optimizer)


@contextlib.contextmanager
def _dividing(parameters: Iterable[torch.Tensor], scale: float) -> Iterator[None]:
    """A context in which gradients are divided by ``scale`` before other hooks and accumulation.

    The division is not done in place, because the same memory may also be accumulated into the
    gradient of another parameter.
    """
    # The hook consists of torch's functions only, so no Python of flatout can fail in backward.
    divide: Any = functools.partial(torch.mul, other=1 / scale)
    changed = []
    try:
        for parameter in parameters:
            hooks: Any = parameter._backward_hooks
            if hooks is None:
                parameter._backward_hooks = hooks = OrderedDict()
            # Torch reads the hooks as a plain dict, so ``move_to_end`` would have no effect.
            others = list(hooks.items())
            hooks.clear()
            hooks[id(divide)] = divide
            hooks.update(others)
            changed.append((parameter, hooks))
        yield
    finally:
        for parameter, hooks in changed:
            hooks.pop(id(divide), None)
            if not hooks:
                parameter._backward_hooks = None
