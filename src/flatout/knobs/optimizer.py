"""Run an optimizer's step in one pass over memory instead of one operation after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.patch import Undo
from flatout.kernels import extensions
from flatout.knob import OPTIMIZER_STEP, Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "optimizer"


def match(facts: Facts) -> Match:
    """Offer the settings where an optimizer object steps."""
    if not facts.has_optimizer_steps:
        return Match((), "no optimizer object steps in this program")
    settings = ("onepass", "fused") if kernels.find_compiler() is not None else ("fused",)
    return Match(settings, share=facts.optimizer_share)


def apply(host: Host, setting: str) -> Undo:
    """Let every optimizer step in one pass, or by torch's fused functions, from now on.

    Raises:
        RefusedError: the kernel cannot be built.
    """
    from flatout.optim import functional

    if setting == "fused":
        stepper: functional.Stepper = functional.Fused()
    else:
        try:
            library = kernels.load("optimizers")
        except kernels.KernelError as error:
            raise RefusedError(f"torch's own optimizer steps are kept: {error}") from error
        stepper = functional.OnePass(library)
    reported: set[tuple[str, str]] = set()

    def report_skipped(name: str, why: str) -> None:
        if (name, why) not in reported:
            reported.add((name, why))
            host.events.add("skipped", NAME, f"{name} is stepped by torch, at least in part: {why}")

    def count_step() -> None:
        handled_calls.counts[NAME] += 1

    override = functional.Override(
        stepper, host.applied.on_failure_of(NAME), report_skipped, count_step
    )
    with contextlib.ExitStack() as undo:
        undo_functions, missing = functional.override_all(override)
        undo.callback(undo_functions)
        for name in missing:
            report_skipped(name, "the program has replaced torch's function for this optimizer")
        if setting == "onepass":
            undo.callback(_prepare_steps(host, count_step))
        return undo.pop_all().close


def _prepare_steps(host: Host, on_step: Callable[[], None]) -> Undo:
    """Make the steps in one call of C++, where that can be compiled."""
    from flatout.optim import functional, prepared

    try:
        native = extensions.load("steps")
    except kernels.KernelError as error:
        host.events.add("noticed", NAME, f"torch's own code collects what a step needs: {error}")
        return lambda: None
    on_failure = host.applied.on_failure_of(NAME)
    return prepared.PreparedSteps(native, functional.SERIAL_BELOW, on_failure, on_step).install()


KNOB = Knob(
    name=NAME,
    summary="run optimizer steps in one pass over memory",
    settings=("fused", "onepass"),
    exactness={"fused": "reordered", "onepass": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces the functions by which torch's optimizers update one tensor "
        "after the other.\n\n"
        "- `onepass`: SGD, Adam, AdamW, RMSprop, Adagrad, Adadelta, Adamax, NAdam and "
        "RAdam, with all their options, update all parameters of a group in one call of a "
        "kernel that is compiled for this processor. The kernel does the operations of "
        "torch's steps in the same order, but rounds square roots to the nearest number, "
        "while torch's may be off in the last bit: so its class is `reordered`. It needs a C "
        "compiler. `flatout.optim` has the same optimizers as classes. From the second step on, "
        "all of `optimizer.step()` is one call of C++, if that can be compiled: it compares the "
        "parameter groups, their options, the state and the gradients with those of the last step, "
        "and leaves the step to torch if one of them has another form, if the program has "
        "registered a hook, or while a profiler runs.\n"
        "- `fused`: Adam, AdamW, SGD and Adagrad use the function that torch has for "
        "`fused=True`, which does all operations of a step in one loop, and "
        "rounds some of them differently. With `amsgrad`, torch's own step stays, "
        "because that function ignores NaNs in the running maximum of the second moments. "
        "Hooks, closures, schedulers and checkpoints see the program's own parameter groups; "
        "none is marked as fused.\n\n"
        "State and checkpoints are torch's own. Torch still updates parameters that are "
        "not float32 or that share memory, parameters with sparse gradients, and "
        "parameters whose state or gradient has another memory layout. (For another "
        "layout, as after `model.to(memory_format=torch.channels_last)` in the middle of "
        "training, torch's own fused kernels silently compute wrong updates.) Torch also "
        "updates all parameters if the program chooses `foreach=True` or `fused=True` "
        "itself.",
        helps="The knob helps programs with many parameter tensors, or whose optimizer takes a "
        "large part of the step. On the CPU, torch otherwise updates the parameters one "
        "by one.",
        hurts="Programs with only a few small tensors gain nothing. The knob does not support "
        "accelerators: there, torch keeps the step counters of fused optimizers on the "
        "device, which would change the contents of a checkpoint.",
        by_hand="Use `flatout.optim.AdamW(parameters)`, or `torch.optim.AdamW(parameters, "
        "fused=True)`.",
        sources=("https://docs.pytorch.org/docs/stable/optim.html",),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the steps of optimizers",),
    kernels=("optimizers",),
    extensions=("steps",),
    replaces=(OPTIMIZER_STEP,),
)
