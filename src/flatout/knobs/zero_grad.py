"""Set gradients to ``None`` instead of zero if the program asks for zeros."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flatout.intercept import handled_calls
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host


NAME = "zero_grad"


def match(facts: Facts) -> Match:
    """Never offered: ``None`` is torch's default, and a program that asks for zeros may read
    them."""
    return Match((), "applied by hand only, to programs that call zero_grad(set_to_none=False)")


def apply(host: Host, setting: str) -> Undo:
    """Replace ``Optimizer.zero_grad``."""
    import torch

    from flatout.intercept.patch import wrap_function

    setter = GradientsToNone()
    failed = host.applied.on_failure_of(NAME)
    with contextlib.ExitStack() as undo:
        undo.callback(setter.fill_all)
        undo.callback(host.before_optimizer_step.append(setter.before_step))
        undo.callback(wrap_function(torch.optim.Optimizer, "zero_grad", failed, setter.zero_grad))
        return undo.pop_all().close


class GradientsToNone:
    """Sets gradients to ``None``, and fills in zeros before a step where no new gradient has come.

    The zeros are needed because torch's optimizers skip a parameter whose gradient is ``None``, but
    apply weight decay and momentum to one whose gradient is zero.
    """

    def __init__(self) -> None:
        self._dropped: WeakIdentityDict[Any, list[torch.Tensor]] = WeakIdentityDict()

    def zero_grad(self, original: Any, optimizer: Any, set_to_none: bool = True) -> None:
        """Set the gradients to ``None`` by torch's method ``original``."""
        if not set_to_none:
            params = (p for group in optimizer.param_groups for p in group["params"])
            with_gradient = [p for p in params if p.grad is not None]
            handled_calls.counts[NAME] += 1
            self._dropped.setdefault(optimizer, []).extend(with_gradient)
        original(optimizer, set_to_none=True)

    def before_step(self, optimizer: Any) -> None:
        """Fill in zeros for each parameter that had a gradient and has got no new one since."""
        import torch

        for param in self._dropped.pop(optimizer) or ():
            if param.grad is None:
                param.grad = torch.zeros_like(param)

    def fill_all(self) -> None:
        """Fill in the zeros for every optimizer that has not stepped yet."""
        for optimizer in self._dropped:
            self.before_step(optimizer)


KNOB = Knob(
    name=NAME,
    summary="set gradients to None instead of zeros",
    settings=("none",),
    exactness={"none": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob makes `optimizer.zero_grad(set_to_none=False)` set the gradients to "
        "`None`, as torch's default does. The backward pass then writes the gradients "
        "instead of adding them to zeros. If a parameter gets no gradient before the "
        "optimizer's step, it is given zeros just before the step, so weight decay and "
        "momentum act as they do without the knob.",
        helps="The knob helps programs that ask for zeros and have many parameters for little "
        "computation.",
        hurts="The knob breaks code that reads `.grad` between `zero_grad` and the backward "
        "pass, because it finds `None`.",
        by_hand="Call `optimizer.zero_grad()` without `set_to_none=False`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("zero_grad",),
)
