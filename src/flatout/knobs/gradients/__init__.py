"""Compute gradients that the program usually discards only if it reads them."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "gradients"


def match(facts: Facts) -> Match:
    """Offer the setting where there may be parameters that the next optimizer step does not use."""
    if not facts.has_optimizer_steps or facts.optimizers == 0:
        return Match((), "no optimizer steps in this program")
    if facts.optimizers == 1:
        return Match((), "the program has one optimizer, so it discards no gradients unread")
    return Match(("on_demand",))


def apply(host: Host, setting: str) -> Undo:
    """Replace the entry into backward, ``zero_grad``, and ``Parameter.grad``.

    Raises:
        RefusedError: training is distributed, or ``precision=fp16`` scales the losses.
    """
    from flatout.knobs.gradients.on_demand import OnDemand, is_distributed

    if is_distributed():
        raise RefusedError("training is distributed: other processes wait for these gradients")
    comparison = host.request.comparison
    arms = comparison.arms if comparison is not None else ()
    if any(plan.get("precision") == "fp16" for plan in (host.request.settings, *arms)):
        raise RefusedError("deferred gradients would miss the loss scale of precision=fp16")
    # A comparison applies and undoes the knob repeatedly; what it has learned is kept.
    on_demand = host.keep(
        NAME,
        "learned",
        lambda: OnDemand(
            host.backward_wrappers,
            lambda why: host.events.add("skipped", NAME, why),
            host.applied.on_failure_of(NAME),
        ),
    )
    with contextlib.ExitStack() as undo:
        undo.callback(on_demand.install())
        undo.callback(host.after_optimizer_step.append(on_demand.stepped))
        return undo.pop_all().close


KNOB = Knob(
    name=NAME,
    summary="postpone gradients that the program usually discards; compute them only if it reads "
    "them",
    settings=("on_demand",),
    exactness={"on_demand": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob defers gradients that the program discards. For example, the loss of a "
        "GAN's generator also computes gradients of the discriminator, and the loss of an "
        "actor computes gradients of the critic. The program discards them unread by the "
        "next `zero_grad`. Backward calls are of one kind if they reach the same parameters "
        "and follow a step of the same optimizer. Once `on_demand` has seen twice that calls "
        "of one kind computed certain gradients that were then discarded unread, it makes "
        "later calls of this kind compute only the other gradients, as "
        "`backward(inputs=...)` does.\n\n"
        "If the program reads a deferred gradient after all (by an optimizer, by "
        "`parameter.grad`, by clipping), flatout computes it at that moment from the same "
        "values that backward would have read. To make this possible, when it defers "
        "gradients it copies those tensors saved for backward that the program could still "
        "change, because something besides the graph refers to them (weights, running "
        "statistics, inputs). While it computes the gradients, it restores the settings of "
        "torch under which backward was called.\n\n"
        "The knob never defers\n\n"
        "- gradients of distributed training and of scaled losses,\n"
        "- gradients of backward calls that keep or create a graph or run under anomaly "
        "detection,\n"
        "- gradients whose graph contains hooks, activation checkpoints, the program's "
        "own `autograd.Function`s, or nodes that do not show which tensors they read,\n"
        "- gradients of parameters that are never zeroed, and sparse gradients.",
        helps="The knob helps programs with more than one optimizer: GANs, actor-critic methods "
        "(SAC, TD3, DDPG).",
        hurts="The program needs more memory: the saved tensors of deferred gradients, and "
        "copies of the weights that they need, live until the gradients are discarded. "
        "C++ code that reads gradients does not see deferred ones.",
        by_hand="Call `requires_grad_(False)` on the discriminator's parameters before the "
        "generator's forward pass, and `requires_grad_(True)` after its backward pass; or "
        "`loss.backward(inputs=list(generator.parameters()))`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.autograd.backward.html",
            "https://docs.pytorch.org/docs/stable/notes/autograd.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the choice of gradients", "zero_grad"),
    memory_settings=("on_demand",),
)
