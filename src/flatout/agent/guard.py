"""The guard of a run with a plan, which keeps infinite and NaN gradients away from the weights.

All gradients are checked before each optimizer step. If some gradients are not finite, all
gradients of the optimizer are hidden from the step, and the knobs that may be the cause are
withdrawn, those of reduced precision first. If gradients are not finite although all such knobs are
undone, the program itself is the cause: an event says so, and the guard is switched off.

On an accelerator the host does not wait for the check. A flag on the device says whether gradients
are finite, and gates the optimizer step there, as in ``torch.amp.GradScaler``
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling). The host reads the flag some steps
later.

A program without an optimizer object updates its weights itself, which cannot be prevented. In such
a program, gradients that are not finite are set to zero when backward ends. Gradients that
``torch.autograd.grad`` returns are not checked.
"""

from __future__ import annotations

import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.loss_watch import LossWatch
from flatout.agent.responder import Responder
from flatout.agent.weight_guard import WeightGuard
from flatout.intercept import objects
from flatout.intercept.finite import are_finite, unscale, values_of
from flatout.intercept.gradients import HiddenGradients, collect_gradients
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.losses import abandon, loss_value, start_loss_copy

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.request import GuardRequest

HOST_DEVICES = ("cpu",)
"""The device types on which an operation has been computed when it returns."""

_CHECKED_TYPES = frozenset({torch.Tensor})
_device = operator.attrgetter("device")


class Guard:
    """Watches the optimizer steps of one process.

    Args:
        host: the host of this process; its settings have been applied.
        envelope: the losses of the proof.
    """

    def __init__(self, host: Host, envelope: GuardRequest) -> None:
        self._host = host
        self._hidden = HiddenGradients()
        self._responder = Responder(host, self._hidden.show)
        self._weights = WeightGuard(host, self._responder)
        self._losses = LossWatch(envelope)
        self._stepped_in_backward: WeakIdentitySet[Any] = WeakIdentitySet()
        self._stepping: Callable[[], Any] = lambda: None
        self._gated: Any = None
        self._flags: deque[tuple[object, str, frozenset[str]]] = deque()

    def install(self) -> None:
        """Add the callbacks around backward calls and optimizer steps."""
        self._host.before_optimizer_step.append(self._before)
        self._host.after_optimizer_step.append(self._after)
        self._host.backward_wrappers.append(self._backward, self._responder.on_failure)

    def remove(self) -> None:
        """Leave torch as it was before ``install``."""
        self._responder.is_off = True
        self._leave_step()
        self._host.backward_wrappers.remove(self._backward)

    def restart(self) -> None:
        """Drop the unread flags in the child of a fork, because they belong to the parent."""
        abandon(self._flags)
        self._flags = deque()

    def finish(self) -> None:
        """Read the remaining flags at the end of the program."""
        if not self._responder.is_off:
            self._responder.attempt(lambda: self._read_flags(wait=True))

    def add_losses(self, losses: Sequence[float]) -> None:
        """Compare the losses that have been read since the last call with the losses of the
        proof."""
        why = self._losses.add(losses)
        if why is not None:
            self._responder.say("noticed", why)
        self._weights.add_losses(losses)

    def at_boundary(self) -> None:
        """Check and copy the weights between two steps, if either is due."""
        self._weights.at_boundary()

    # Callbacks

    def _before(self, optimizer: Any) -> None:
        self._responder.attempt(lambda: self._enter_step(optimizer))

    def _after(self, optimizer: Any) -> None:
        self._responder.attempt(self._leave_step)

    def _backward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        if kwargs.get("accumulate_grad") and not self._responder.is_off:
            self._responder.attempt(self._check_after_backward)
        return result

    # Gradients

    def _enter_step(self, optimizer: Any) -> None:
        self._leave_step()  # an exception may have ended the previous step
        if self._responder.is_off:
            return
        self._stepping = weakref.ref(optimizer)
        self._read_flags(wait=False)
        if optimizer not in self._stepped_in_backward:
            self._check_step(optimizer)

    def _leave_step(self) -> None:
        self._stepping = lambda: None
        self._hidden.show()
        if self._gated is not None:
            del self._gated.found_inf, self._gated.grad_scale
            self._gated = None

    def _check_step(self, optimizer: Any) -> None:
        """Hide the gradients from a step if some are not finite."""
        if not self._responder.is_needed():
            return
        if getattr(optimizer, "found_inf", None) is not None:
            return  # the program's GradScaler gates this step
        checked = self._host.optimizers_with_finite_gradients
        if optimizer in checked:
            checked.discard(optimizer)
            return
        grads = collect_gradients(optimizer)
        if not _can_check(grads):
            return
        what = f"gradients of {type(optimizer).__qualname__} were not finite"
        suspects = self._responder.suspects()
        if _are_on_host(grads):
            if not are_finite(grads) and self._responder.respond(what, suspects):
                self._hidden.hide(optimizer)
            return
        flag = _join_flags(unscale(grads, 1.0))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, flag
            self._gated = optimizer
        else:
            _zero_where(flag, grads)
        self._flags.append((start_loss_copy(flag), what, suspects))

    def _check_after_backward(self) -> None:
        stepping = self._stepping()
        if stepping is not None:  # backward was called in the closure of a step
            self._stepped_in_backward.add(stepping)
            self._check_step(stepping)
        elif not self._host.hooks.optimizer_exists:
            self._check_before_manual_update()

    def _check_before_manual_update(self) -> None:
        """Set all gradients to zero if some are not finite."""
        self._read_flags(wait=False)
        if not self._responder.is_needed():
            return
        parameters = (p for root in self._host.roots for p in objects.parameters(root))
        grads = [grad for p in parameters if (grad := p.grad) is not None]
        if not _can_check(grads):
            return
        what = "gradients were not finite"
        suspects = self._responder.suspects()
        if _are_on_host(grads):
            if not are_finite(grads) and self._responder.respond(what, suspects):
                with torch.no_grad():
                    for grad in grads:
                        grad.zero_()
            return
        flag = _join_flags(unscale(grads, 1.0))
        _zero_where(flag, grads)
        self._flags.append((start_loss_copy(flag), what, suspects))

    def _read_flags(self, wait: bool) -> None:
        """Respond to the flags that have arrived from the device."""
        while self._flags:
            flag, what, suspects = self._flags[0]
            number = loss_value(flag, wait)
            if number is None:
                return
            self._flags.popleft()
            if number and not self._responder.is_off:
                self._responder.respond(what, suspects)


def _can_check(grads: Sequence[torch.Tensor]) -> bool:
    """Whether there are gradients, and none is of a subclass. The processes of a job could decide
    differently about their shards of a distributed tensor."""
    return bool(grads) and _CHECKED_TYPES.issuperset(map(type, grads))


def _are_on_host(tensors: Iterable[torch.Tensor]) -> bool:
    return all(device.type in HOST_DEVICES for device in set(map(_device, tensors)))


def _join_flags(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return one flag on the device of the first flag. It is 1 if any flag is 1."""
    joined, *others = flags
    for flag in others:
        joined = torch.maximum(joined, flag.to(joined.device, non_blocking=True))
    return joined


def _zero_where(flag: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
    """Set all gradients to zero if the flag is 1, without waiting for the device."""
    with torch.no_grad():
        for grad in grads:
            values = values_of(grad)
            values.masked_fill_(flag.to(values.device, non_blocking=True).bool(), 0)
