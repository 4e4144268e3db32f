"""Evaluation passes without a graph, where the program forgot to say so."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.intercept import engagement
from flatout.intercept.identity import WeakIdentityDict, WeakIdentitySet
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host


NAME = "evaluation"

OBSERVED = 2
"""Passes of each module in evaluation mode that are left as they are and looked at."""


def match(facts: Facts) -> Match:
    """By hand only: losses by a fixed network, and adversarial code, look like evaluation."""
    return Match((), "for programs in which 'flatout doctor' finds gradients in evaluation")


def apply(host: Host, setting: str) -> Undo:
    """Wrap the outermost module calls."""
    return host.forward_wrappers.append(NoGrad(host))


class NoGrad:
    """A forward wrapper.

    Args:
        host: of this process.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._observed: WeakIdentityDict[Any, int] = WeakIdentityDict()
        self._used: WeakIdentitySet[Any] = WeakIdentitySet()

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Around an outermost module call."""
        import torch

        from flatout.intercept import objects

        if (
            objects.is_training(module)
            or not torch.is_grad_enabled()
            or module in self._used
            or _requires_grad((args, kwargs))
        ):
            return call(module, *args, **kwargs)
        count = self._observed.get(module) or 0
        if count < OBSERVED:
            self._observed[module] = count + 1
            return self._watched(call(module, *args, **kwargs), module)
        engagement.calls[NAME] += 1
        with torch.no_grad():
            return call(module, *args, **kwargs)

    def _watched(self, output: Any, module: Any) -> Any:
        """The output, with a hook that says when a backward pass comes through it."""
        from flatout.intercept import objects
        from flatout.intercept.nested import map_tensors

        reference = weakref.ref(module)

        def is_used(gradient: Any) -> None:
            used = reference()
            if used is not None and used not in self._used:
                self._used.add(used)
                name = objects.class_name(used)
                why = f"{name} is left alone: a backward pass goes through it in evaluation mode"
                self._host.events.add("skipped", NAME, why)

        def watch(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.requires_grad:
                tensor.register_hook(is_used)
            return tensor

        return map_tensors(watch, output)


def _requires_grad(value: Any) -> bool:

    from flatout.intercept.nested import map_tensors

    found = []

    def look(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.requires_grad:
            found.append(tensor)
        return tensor

    map_tensors(look, value)
    return bool(found)


KNOB = Knob(
    name=NAME,
    summary="evaluation passes under no_grad, where the program forgot it",
    settings=("no_grad",),
    exactness={"no_grad": "reordered"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="Calls of an outermost module in evaluation mode run under `torch.no_grad()`, from "
        f"its third such call on: the first {OBSERVED} show whether a backward pass goes through "
        "it. A module through which one does, and calls whose inputs require gradients, are left "
        "alone. Without gradients torch's transformer layers, attention modules and LSTM take "
        "other kernels, so that their outputs are rounded in another order.",
        helps="Evaluation and inference loops that record a graph which nobody uses: it costs "
        "memory and the time to make it.",
        hurts="A module in evaluation mode whose output is only trained through later (a loss by "
        "a fixed network that begins after some epochs): the backward pass then fails. Hence only "
        "by hand.",
        by_hand="`with torch.inference_mode(): ...` around the evaluation",
        sources=(
            "https://docs.pytorch.org/docs/stable/notes/autograd.html"
            "#locally-disabling-gradient-computation",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the gradient mode of evaluation",),
)
