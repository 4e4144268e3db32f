"""Replay outermost module calls, forward and backward, as flat lists of torch's operators."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.kernels import KernelError, extensions
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "replay"

LEAST_OVERHEAD = 0.1
"""The knob is tried where Python and dispatch take at least this share of a step."""


def match(facts: Facts) -> Match:
    """Offer the setting where a step spends much of its time between operators."""
    why = extensions.missing()
    if why is not None:
        return Match((), why)
    if facts.calls_modules is False:
        return Match((), "the job calls no modules")
    overhead = facts.overhead_share
    if overhead is not None and overhead < LEAST_OVERHEAD:
        return Match((), f"Python and dispatch take {overhead:.0%} of a step")
    return Match(("operators",), share=facts.module_share if overhead is None else overhead)


def apply(host: Host, setting: str) -> Undo:
    """Replay each outermost module once flatout's search for them is over.

    Raises:
        RefusedError: the extension cannot be built or loaded, or the program runs on several ranks.
    """
    from flatout.parallel.place import place

    if place() is not None:
        raise RefusedError("with --ranks, the calls of outermost modules are split")
    try:
        native = extensions.load("replay")
    except KernelError as error:
        raise RefusedError(f"torch's own calls stay: {error}") from error
    from flatout.knobs.replay.calls import Replays

    replays = Replays(host, native)
    with contextlib.ExitStack() as undo:
        undo.callback(host.forward_wrappers.append(replays))
        undo.callback(host.before_optimizer_step.append(replays.look))
        undo.callback(host.backward_wrappers.append(replays.look_at_order))
        return undo.pop_all().close


KNOB = Knob(
    name=NAME,
    summary="call the operators of outermost modules one after the other, without Python",
    settings=("operators",),
    exactness={"operators": "bitwise"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob captures the forward and backward pass of an outermost module, as "
        "`torch.compile` does (with Dynamo and AOTAutograd). It does the same for a method of "
        "this module that returns what the loss is made of (such as a policy's "
        "`evaluate_actions`). From then on, a call makes the same calls of the same operators "
        "from C++, in the same order: without the module's Python code, without recording each "
        "operator for autograd, and without autograd's engine in backward. Nothing is fused or "
        "computed in another way, so results stay the same bit by bit, random numbers included."
        "\n\n"
        "Dynamo's guards are checked at each call. A call that matches no graph is made as usual; "
        "when inputs of one kind come for the third time, a graph is captured for them, up to six "
        "graphs of a module. A module is left alone if it cannot be captured as one graph, if its "
        "outputs share memory with its inputs, if it is called with ever new shapes, or if "
        "its backward passes need gradients of gradients. If the program asks for gradients of "
        "gradients for the first time when a graph has already been captured, this one backward "
        "pass adds up its gradients in another order than torch; from then on, the module is left "
        "alone. The record of a run holds the "
        "number of graphs and of their operators. Inside of captured calls, the knobs `attention`, "
        "`recurrent` and `cross_entropy` have no effect, nor has dropout's part of `random`. "
        "An extension is compiled once for each version of torch, which takes half a minute.",
        helps="The knob helps programs with short steps and many small operators: tabular "
        "networks, forecasting, recurrent cells written in Python, reinforcement learning.",
        hurts="Capturing takes a second or more for each graph. The first graphs of a module are "
        "captured at once; each further one waits until captures take at most 2 % of the time. "
        "Programs whose time goes to large operators gain nothing.",
        by_hand='There is no such backend in torch; `torch.compile(model, backend="aot_eager")` '
        "captures the same, but runs it from Python.",
        sources=(
            "https://docs.pytorch.org/docs/stable/torch.compiler_dynamo_deepdive.html",
            "https://docs.pytorch.org/functorch/stable/notebooks/aot_autograd_optimizations.html",
        ),
    ),
    match=match,
    apply=apply,
    extensions=("replay",),
    waits_for_calls=True,
    claims=("the compilation of modules", "autocast"),
)
