"""Gradients that the program throws away, computed only if it asks for them."""

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
    """Needs parameters that a backward call may reach and the next step leaves alone."""
    if not facts.updates or facts.optimizers == 0:
        return Match((), "no optimizer steps in it")
    if facts.optimizers == 1:
        return Match(
            (), "it has one optimizer: the gradients of another's parameters are not at stake"
        )
    return Match(("on_demand",))


def apply(host: Host, setting: str) -> Undo:
    """Take the place of the way into backward, of ``zero_grad``, and of ``Parameter.grad``."""
    from flatout.knobs.gradients.on_demand import OnDemand, is_distributed

    if is_distributed():
        raise RefusedError("other processes wait for the gradients of this one")
    comparison = host.request.comparison
    arms = comparison.arms if comparison is not None else ()
    if any(plan.get("precision") == "fp16" for plan in (host.request.settings, *arms)):
        raise RefusedError("what is put off would miss the scale of precision=fp16")
    # A comparison turns this on and off: each time, it goes on from what it knows.
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
    summary="gradients that the program throws away, computed only if it asks for them",
    settings=("on_demand",),
    exactness={"on_demand": "bitwise"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The loss of a GAN's generator also gives gradients to the discriminator, that of an "
        "actor to the critic, and the next `zero_grad` drops them unread. `on_demand` sees twice "
        "which gradients of a backward call are dropped, and puts these off from then on: the "
        "call computes the others only, as `backward(inputs=...)` does. Where one is asked for "
        "after all (by an optimizer, by `parameter.grad`, by clipping), it is computed then, from "
        "what backward would have read: saved tensors that anything else refers to (weights, "
        "running statistics, inputs) are copied when the call puts something off, and torch's "
        "settings are for that moment those of the call. Left alone are gradients with hooks or "
        "checkpoints on their way, of graphs with `autograd.Function`s of the program or nodes "
        "that do not show what they read, of scaled losses, of backward calls that keep or create "
        "a graph, under anomaly detection, of distributed training, of parameters that nobody "
        "zeroes, and sparse ones.",
        helps="GANs; actor-critic methods (SAC, TD3, DDPG): all with more than one optimizer.",
        hurts="What backward needs for the gradients put off, and copies of the weights that it "
        "reads, live until they are dropped: more memory. Code in C++ that reads gradients finds "
        "none.",
        by_hand="`for p in discriminator.parameters(): p.requires_grad_(False)` before the "
        "generator's forward pass, and back after its backward; or `loss.backward(inputs=list("
        "generator.parameters()))`",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.autograd.backward.html",
            "https://docs.pytorch.org/docs/stable/notes/autograd.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the choice of gradients", "zero_grad"),
)
