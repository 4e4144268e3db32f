"""Gradients dropped instead of set to zero, where the program asks for zeros."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from flatout.intercept import engagement
from flatout.intercept.identity import WeakIdentityDict
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host


NAME = "zero_grad"


def match(facts: Facts) -> Match:
    """By hand only: it is torch's default, and a program that asks for zeros may read them."""
    return Match((), "for programs that call zero_grad(set_to_none=False)")


def apply(host: Host, setting: str) -> Undo:
    """Take the place of ``Optimizer.zero_grad``."""
    import torch

    from flatout.intercept.patch import wrap_function

    dropping = Dropping()
    on_failure = host.applied.on_failure_of(NAME)
    with contextlib.ExitStack() as undo:
        undo.callback(dropping.fill_all)
        undo.callback(host.before_optimizer_step.append(dropping.before_step))
        undo.callback(
            wrap_function(torch.optim.Optimizer, "zero_grad", on_failure, dropping.zero_grad)
        )
        return undo.pop_all().close


class Dropping:
    """Drops gradients, and gives zeros to parameters that get none until the step.

    Torch's optimizers pass over a parameter without a gradient, but decay and move one whose
    gradient is zero.
    """

    def __init__(self) -> None:
        self._dropped: WeakIdentityDict[Any, list[torch.Tensor]] = WeakIdentityDict()

    def zero_grad(self, own: Any, optimizer: Any, set_to_none: bool = True) -> None:
        """In the place of torch's method ``own``."""
        if not set_to_none:
            params = (p for group in optimizer.param_groups for p in group["params"])
            with_gradient = [p for p in params if p.grad is not None]
            engagement.calls[NAME] += 1
            self._dropped.setdefault(optimizer, []).extend(with_gradient)
        own(optimizer, set_to_none=True)

    def before_step(self, optimizer: Any) -> None:
        """Give a parameter that had a gradient, and has got none since, the zeros it would have."""
        import torch

        for param in self._dropped.pop(optimizer) or ():
            if param.grad is None:
                param.grad = torch.zeros_like(param)

    def fill_all(self) -> None:
        """The same for all that have not stepped yet."""
        for optimizer in self._dropped:
            self.before_step(optimizer)


KNOB = Knob(
    name=NAME,
    summary="gradients dropped instead of filled with zeros",
    settings=("none",),
    exactness={"none": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="`optimizer.zero_grad(set_to_none=False)` drops the gradients as the default does: "
        "the backward pass then writes them instead of adding to zeros. A parameter that gets "
        "none before the step is given its zeros then, so that weight decay and momentum go on as "
        "without this.",
        helps="Programs that ask for zeros, with many parameters for their computation.",
        hurts="Code that reads `.grad` between `zero_grad` and the backward pass finds `None`.",
        by_hand="`optimizer.zero_grad()`",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.optim.Optimizer.zero_grad.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("zero_grad",),
)
