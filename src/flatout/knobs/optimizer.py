"""The optimizer's step: one pass over memory in place of one operation after the other."""

from __future__ import annotations

import inspect
import weakref
from typing import TYPE_CHECKING, Any

from flatout import kernels
from flatout.knobs import Card, Facts, Knob, Match, RefusedError, Undo

if TYPE_CHECKING:
    import torch

    from flatout.agent.session import Session

NAME = "optimizer"


def match(facts: Facts) -> Match:
    """Needs an optimizer object that steps."""
    if not facts.updates:
        return Match((), "no optimizer object steps in this program")
    settings = ("onepass", "fused") if kernels.find_compiler() is not None else ("fused",)
    return Match(settings, share=facts.optimizer_share)


def apply(session: Session, setting: str) -> Undo:
    """Let every optimizer step in one pass from now on, or those that have stepped once fused."""
    return {"onepass": _onepass, "fused": _fused}[setting](session)


def _onepass(session: Session) -> Undo:
    from flatout.optim import functional

    try:
        stand_ins = functional.load(session.turns_back(NAME))
    except kernels.KernelError as error:
        raise RefusedError(f"torch's own steps stay: {error}") from error
    for stand_in in stand_ins:
        stand_in.install()

    def undo() -> None:
        for stand_in in stand_ins:
            stand_in.remove()

    return undo


def _fused(session: Session) -> Undo:
    fused = _FusedSteps(session)
    session.before_optimizer_step.append(fused.before)
    session.after_optimizer_step.append(fused.after)

    def undo() -> None:
        session.before_optimizer_step.remove(fused.before)
        session.after_optimizer_step.remove(fused.after)
        fused.restore()

    return undo


class _FusedSteps:
    """Sets and restores the flag around each step.

    The first step of an optimizer is left as it is: it creates the state as the program would, and
    shows the gradients, which a step with a closure only computes after ``before`` was called.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._said: set[tuple[type, str]] = set()
        self._flagged: list[dict[str, Any]] = []

    def before(self, optimizer: Any) -> None:
        """Set the flag."""
        self.restore()  # a step that was left by an exception
        if optimizer in self._checked and refusal(optimizer) is None:
            for group in optimizer.param_groups:
                group["fused"] = True
                self._flagged.append(group)

    def after(self, optimizer: Any) -> None:
        """Restore the flag and look at what the step has left."""
        self.restore()
        why = refusal(optimizer)
        if why is None:
            self._checked.add(optimizer)
            return
        self._checked.discard(optimizer)
        kind = type(optimizer)
        if (kind, why) not in self._said:
            self._said.add((kind, why))
            self._session.event("skipped", NAME, f"{kind.__qualname__} is left alone: {why}")

    def restore(self) -> None:
        """Give every flag the value that the program left, ``None`` (else we leave it alone)."""
        for group in self._flagged:
            group["fused"] = None
        self._flagged.clear()


def refusal(optimizer: Any) -> str | None:
    """Why torch's fused step must not be used for this optimizer as it is now, or ``None``."""
    import torch
    from torch import optim

    kinds: tuple[Any, ...] = (optim.Adam, optim.AdamW, optim.SGD, optim.Adagrad)
    step = inspect.unwrap(type(optimizer).step)  # torch wraps the step of each class it first meets
    if all(step is not inspect.unwrap(kind.step) for kind in kinds):
        return "torch has no fused step for it"
    if torch.get_default_dtype() != torch.float32:
        return "the default dtype is not float32"
    for group in optimizer.param_groups:
        if group.get("fused") is not None or group.get("foreach") is not None:
            return "the program has chosen foreach or fused itself"
        if group.get("differentiable") or group.get("capturable"):
            return "it is differentiable or capturable"
        if isinstance(group["lr"], torch.Tensor):
            return "its learning rate is a tensor"
        for parameter in group["params"]:
            why = _parameter_refusal(parameter, optimizer.state.get(parameter, {}), group)
            if why is not None:
                return why
    return None


def _parameter_refusal(
    parameter: torch.Tensor, state: dict[str, Any], group: dict[str, Any]
) -> str | None:
    import torch

    if not parameter.requires_grad:
        return None
    if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
        return "it has parameters that are not float32 on the CPU"
    gradient = parameter.grad
    if gradient is not None and (gradient.is_sparse or gradient.dtype != torch.float32):
        return "it has gradients that are sparse or not float32"
    if group.get("momentum") and state.get("momentum_buffer") is None:
        return "some parameters have no momentum yet"
    layout: dict[str, Any] = {}
    if not parameter.is_contiguous():
        layout["memory_format"] = (
            torch.channels_last if parameter.dim() == 4 else torch.channels_last_3d
        )
        if parameter.dim() not in (4, 5) or not parameter.is_contiguous(**layout):
            return "it has parameters that are views"
    if gradient is not None and not gradient.is_contiguous(**layout):
        return "it has gradients in another memory format than their parameters"
    for value in state.values():
        if (
            isinstance(value, torch.Tensor)
            and value.dim()
            and (value.shape != parameter.shape or not value.is_contiguous(**layout))
        ):
            return "its state is in another memory format than the parameters"
    return None


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
        "of a group in one call. State and checkpoints are torch's own. Parameters that are not "
        "float32, sparse gradients, and tensors laid out unlike their parameters are stepped by "
        "torch as ever; so are programs that choose `foreach` or `fused` themselves. Needs a C "
        "compiler. `flatout.optim` has the same as classes.\n\n"
        "`fused`: sets torch's `fused=True` in the parameter groups of Adam, AdamW, SGD and "
        "Adagrad while they step, and takes it back after each step, so that checkpoints are those "
        "of the program without it. Optimizers whose parameters, gradients and state are not laid "
        "out alike are left alone: torch's fused kernels would compute wrong updates, silently "
        "(for instance after `model.to(memory_format=torch.channels_last)` in the middle of "
        "training).",
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
    claims=("the steps of optimizers",),
    kernels=("optimizers",),
)
