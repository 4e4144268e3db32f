"""The optimizer's step: one pass over memory in place of one operation after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "optimizer"


def match(facts: Facts) -> Match:
    """Needs an optimizer object that steps."""
    if not facts.updates:
        return Match((), "no optimizer object steps in this program")
    settings = ("onepass", "fused") if kernels.find_compiler() is not None else ("fused",)
    return Match(settings, share=facts.optimizer_share)


def apply(host: Host, setting: str) -> Undo:
    """Let every optimizer step in one pass, or by torch's fused functions, from now on."""
    from flatout.optim import functional

    if setting == "fused":
        way: functional.Way = functional.Fused()
    else:
        try:
            library = kernels.load("optimizers")
        except kernels.KernelError as error:
            raise RefusedError(f"torch's own steps stay: {error}") from error
        way = functional.OnePass(library)
    said: set[tuple[str, str]] = set()

    def leave(name: str, why: str) -> None:
        if (name, why) not in said:
            said.add((name, why))
            host.events.add("skipped", NAME, f"{name} is left to torch, at least in part: {why}")

    def engaged() -> None:
        engagement.calls[NAME] += 1

    user = functional.User(way, host.applied.on_failure_of(NAME), leave, engaged)
    undo, missing = functional.turn(user)
    for name in missing:
        leave(name, "the function that steps it is not torch's own")
    return undo


KNOB = Knob(
    name=NAME,
    summary="steps of optimizers in one pass over memory",
    settings=("fused", "onepass"),
    exactness={"fused": "reordered", "onepass": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="`onepass`: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam and RAdam, "
        "with all their options, step through kernels compiled for this processor, all parameters "
        "of a group in one call, with the operations of torch's steps, in their order. Needs a C "
        "compiler. `flatout.optim` has the same as classes.\n\n"
        "`fused`: Adam, AdamW, SGD and Adagrad step by the function that torch has for "
        "`fused=True`, but with `amsgrad`, where it forgets what is not a number. Nobody is told: "
        "hooks, closures, schedulers and checkpoints see the parameter groups of the program.\n\n"
        "State and checkpoints are torch's own. Parameters that are not float32 or that share "
        "memory, sparse gradients, and tensors laid out unlike their parameters are stepped by "
        "torch as ever (its fused kernels would compute wrong updates, silently, after "
        "`model.to(memory_format=torch.channels_last)` in the middle of training); so are programs "
        "that choose `foreach=True` or `fused=True` themselves.",
        helps="Many parameter tensors, or an optimizer that takes a good part of the step: on the "
        "CPU torch otherwise goes through the parameters one by one.",
        hurts="Hardly ever; a few small tensors gain nothing. Not for accelerators: there torch "
        "keeps the step counters of fused optimizers on the device, which would change what a "
        "checkpoint holds.",
        by_hand="`flatout.optim.AdamW(parameters)`, or `torch.optim.AdamW(parameters, fused=True)`",
        sources=("https://docs.pytorch.org/docs/stable/optim.html",),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the steps of optimizers",),
    kernels=("optimizers",),
)
