"""Run evaluation passes under ``torch.no_grad()`` if the program does not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.intercept import handled_calls
from flatout.intercept.identity import WeakIdentityDict, WeakIdentitySet
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host


NAME = "evaluation"

OBSERVED = 2
"""Number of calls of each module in evaluation mode that run unchanged and are only observed."""


def match(facts: Facts) -> Match:
    """Never offered: a frozen network used as a loss, or adversarial code, looks like
    evaluation."""
    return Match(
        (), "applied by hand only, where 'flatout doctor' finds that evaluation records gradients"
    )


def apply(host: Host, setting: str) -> Undo:
    """Wrap outermost module calls in ``torch.no_grad()``."""
    wrapper = NoGrad(host)
    undo = host.forward_wrappers.append(wrapper)
    host.forward_wrappers.leave_inference(wrapper)  # which records no gradients anyway
    return undo


class NoGrad:
    """A forward wrapper that turns gradients off for modules in evaluation mode.

    Args:
        host: the process that is tuned.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._observed_calls: WeakIdentityDict[Any, int] = WeakIdentityDict()
        self._reached_by_backward: WeakIdentitySet[Any] = WeakIdentitySet()

    def __call__(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an outermost module call, without gradients if backward never reaches the module."""
        import torch

        from flatout.intercept import objects

        if (
            objects.is_training(module)
            or module in self._reached_by_backward
            or _requires_grad((args, kwargs))
        ):
            return call(module, *args, **kwargs)
        count = self._observed_calls.get(module) or 0
        if count < OBSERVED:
            self._observed_calls[module] = count + 1
            return self._watch_output(call(module, *args, **kwargs), module)
        handled_calls.counts[NAME] += 1
        with torch.no_grad():
            return call(module, *args, **kwargs)

    def _watch_output(self, output: Any, module: Any) -> Any:
        """Hook the output's tensors to find out whether a backward pass reaches them."""
        from flatout.intercept import objects
        from flatout.intercept.nested import map_tensors

        reference = weakref.ref(module)

        def note_backward(gradient: Any) -> None:
            reached = reference()
            if reached is not None and reached not in self._reached_by_backward:
                self._reached_by_backward.add(reached)
                name = objects.class_name(reached)
                why = f"{name} is left alone: a backward pass goes through it in evaluation mode"
                self._host.events.add("skipped", NAME, why)

        def watch(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.requires_grad:
                tensor.register_hook(note_backward)
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
    summary="run evaluation passes under no_grad if the program does not",
    settings=("no_grad",),
    exactness={"no_grad": "reordered"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob runs calls of an outermost module in evaluation mode under "
        f"`torch.no_grad()`. It does not change the first {OBSERVED} such calls of each "
        "module, and observes whether a backward pass reaches their outputs; if one does, "
        "it does not change that module at all. Nor does it change calls whose inputs "
        "require gradients. Without gradients, torch's transformer layers, attention "
        "modules and LSTM use other kernels, so their outputs differ by rounding errors.",
        helps="The knob helps evaluation and inference loops that record an autograd graph "
        "which nobody uses. Recording the graph takes time, and keeping it takes memory.",
        hurts="Some programs train through a module in evaluation mode only later, for example "
        "with a perceptual loss that starts after some epochs. Their backward pass then "
        "fails. That is why `flatout tune` never tries this knob.",
        by_hand="Put `with torch.inference_mode(): ...` around the evaluation.",
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
