"""The guard of a run with a plan: what lower precision breaks must not reach the weights.

Before each optimizer step all gradients are looked at. If some are not finite, the step finds no
gradients, and the knobs that may be to blame are turned back, those of reduced precision first. If
gradients are not finite with all of them turned back, that is the program's own: the guard says so
and leaves it alone from then on.

On an accelerator the host does not wait for that: the flag that says whether gradients are finite
stays on the device and gates the update there, as in ``torch.amp.GradScaler``
(https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling), and is read some steps later.

A program that updates by hand cannot be kept from doing so. Gradients that are not finite are set
to zero as backward ends; those that ``torch.autograd.grad`` returns are the program's alone.
"""

from __future__ import annotations

import math
import operator
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flatout import knobs
from flatout.agent.snapshot import Snapshot, size_bytes, weights_are_finite
from flatout.intercept import objects
from flatout.intercept.containment import attempt
from flatout.intercept.finite import HiddenGradients, are_finite, gradients, unscale, values_of
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.losses import abandon, loss_number, read_loss
from flatout.knob import Exactness

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.request import Envelope

NAME = "guard"

BOLDEST_FIRST: tuple[frozenset[Exactness], ...] = (
    frozenset({"reduced"}),
    frozenset({"reordered", "resampled", "reshuffled"}),
)
"""Which settings are turned back together."""

HOST_DEVICES = ("cpu",)
"""Device types whose results are there when the operation returns."""

SNAPSHOT_PERIOD_S = 30.0
SNAPSHOT_SHARE = 0.005
"""Running time between two snapshots, longer where they would take more than this share of it."""

PAUSE_S = 1.0
"""A longer gap without a sign of the program, more than twice as long as the one before, is a pause
(it was stopped, or the machine slept), and counts as so long."""

BYTES_PER_S = 1e9
"""At which a snapshot is supposed to be copied before one was timed: slow, for any memory."""

FAR = 10.0
"""Margins that a loss may be above the proven one without a word. A margin is one standard
deviation of losses between few seeds: with four of them, one run in a thousand is farther off by
chance (one-sided t distribution with 3 degrees of freedom: 10.2)."""


_PLAIN = frozenset({torch.Tensor})
_device = operator.attrgetter("device")


class NotFiniteError(ArithmeticError):
    """Gradients or weights that are infinite or not a number."""


class RunningTime:
    """How long the program has run, its pauses left out.

    Attributes:
        s: seconds so far.
    """

    def __init__(self) -> None:
        self.s = 0.0
        self._heard_s = time.monotonic()
        self._gap_s = 0.0

    def hear(self, now_s: float) -> None:
        """The program runs at this time of the monotonic clock."""
        self._gap_s = min(now_s - self._heard_s, max(PAUSE_S, 2 * self._gap_s))
        self._heard_s = now_s
        self.s += self._gap_s


class Guard:
    """Watches over the steps of one process.

    Args:
        host: of this process, its settings applied.
        envelope: the losses of the proof.
    """

    def __init__(self, host: Host, envelope: Envelope) -> None:
        self._host = host
        self._classes = {
            name: knobs.get(name).exactness[setting]
            for name, setting in host.request.settings.items()
            if not knobs.is_bitwise(name, setting)
        }
        self._losses = LossWatch(envelope)
        self._snapshot = Snapshot()
        self._snapshot_s: float | None = None
        self._running = RunningTime()
        self._snapshot_due_s = SNAPSHOT_PERIOD_S
        self._by_closure: WeakIdentitySet[Any] = WeakIdentitySet()
        self._said: set[str] = set()
        self._withheld = HiddenGradients()
        self._stepping: Callable[[], Any] = lambda: None
        self._gated: Any = None
        self._flags: deque[tuple[object, str, frozenset[str]]] = deque()
        self._has_acted = False
        self._is_off = False
        self._looks_at_weights = False
        self._takes_snapshot = False

    # Life

    def install(self) -> None:
        """Begin."""
        self._host.before_optimizer_step.append(self._before)
        self._host.after_optimizer_step.append(self._after)
        self._host.backward_wrappers.append(self._backward, self._has_failed)

    def remove(self) -> None:
        """Leave torch as it was found."""
        self._is_off = True
        self._leave_step()
        self._host.backward_wrappers.remove(self._backward)

    def restart(self) -> None:
        """In the child of a fork: what is still on its way there is the parent's."""
        abandon(self._flags)
        self._flags = deque()

    def finish(self) -> None:
        """The program is at its end: read what is still on its way."""
        if not self._is_off:
            self._contained(lambda: self._read_flags(wait=True))

    # Gradients

    def _before(self, optimizer: Any) -> None:
        """An optimizer is about to step."""
        self._contained(lambda: self._enter_step(optimizer))

    def _after(self, optimizer: Any) -> None:
        """It has stepped."""
        self._contained(self._leave_step)

    def _enter_step(self, optimizer: Any) -> None:
        self._leave_step()  # one that was left by an exception
        if self._is_off:
            return
        self._stepping = weakref.ref(optimizer)
        self._read_flags(wait=False)
        if optimizer not in self._by_closure:
            self._look(optimizer)

    def _leave_step(self) -> None:
        self._stepping = lambda: None
        self._withheld.show()
        if self._gated is not None:
            del self._gated.found_inf, self._gated.grad_scale
            self._gated = None

    def _look(self, optimizer: Any) -> None:
        """Keep gradients that are not finite from the step."""
        turned = self._turned()
        if not turned and not self._has_acted:
            return
        if getattr(optimizer, "found_inf", None) is not None:
            return  # the program's GradScaler sees to it
        checked = self._host.checked_gradients
        if optimizer in checked:
            checked.discard(optimizer)
            return
        grads = gradients(optimizer)
        if not grads or not _PLAIN.issuperset(map(type, grads)):
            return  # shards of a distributed tensor: each process would decide for itself
        name = f"gradients of {type(optimizer).__qualname__}"
        if _are_on_host(grads):
            if not are_finite(grads) and self._answer(f"{name} were not finite", turned):
                self._withheld.hide(optimizer)
            return
        found = _joined(unscale(grads, 1.0))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale, optimizer.found_inf = None, found
            self._gated = optimizer
        else:
            _zero_where(found, grads)
        self._flags.append((read_loss(found), f"{name} were not finite", turned))

    def _backward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = own(*args, **kwargs)
        if kwargs.get("accumulate_grad") and not self._is_off:
            self._contained(self._look_after_backward)
        return result

    def _look_after_backward(self) -> None:
        stepping = self._stepping()
        if stepping is not None:  # a closure: the update follows at once
            self._by_closure.add(stepping)
            self._look(stepping)
        elif not self._host.hooks.optimizer_exists:
            self._look_before_update_by_hand()

    def _look_before_update_by_hand(self) -> None:
        self._read_flags(wait=False)
        turned = self._turned()
        if not turned and not self._has_acted:
            return
        parameters = (p for root in self._host.roots for p in objects.parameters(root))
        grads = [grad for p in parameters if (grad := p.grad) is not None]
        if not grads or not _PLAIN.issuperset(map(type, grads)):
            return
        what = "gradients were not finite"
        if _are_on_host(grads):
            if not are_finite(grads) and self._answer(what, turned):
                with torch.no_grad():
                    for grad in grads:
                        grad.zero_()
            return
        found = _joined(unscale(grads, 1.0))
        _zero_where(found, grads)
        self._flags.append((read_loss(found), what, turned))

    def _read_flags(self, wait: bool) -> None:
        """Answer the flags that have arrived from the device."""
        while self._flags:
            flag, what, turned = self._flags[0]
            number = loss_number(flag, wait)
            if number is None:
                return
            self._flags.popleft()
            if number and not self._is_off:
                self._answer(what, turned)

    # The answer

    def _turned(self) -> frozenset[str]:
        """The knobs that may be to blame and are in place, or on their way back."""
        return frozenset(self._host.applied.names & self._classes.keys())

    def _answer(self, what: str, turned: Collection[str]) -> bool:
        """Turn knobs back; returns whether the guard still keeps what is not finite away.

        Args:
            what: was not finite.
            turned: knobs that were in place when it was computed.
        """
        host = self._host
        self._looks_at_weights = True
        host.ask_for_boundary()
        if any(knob in host.applied.failures for knob in turned):
            return True  # computed before they were turned back
        for kinds in BOLDEST_FIRST:
            blamed = [knob for knob in turned if self._classes[knob] in kinds]
            if blamed:
                self._has_acted = True
                for knob in sorted(blamed):
                    host.applied.withdraw(knob, NotFiniteError(f"{what}, and left out"))
                return True
        self._say(
            "noticed",
            f"{what} with no knob turned that changes results: the program's own, left alone from "
            "now on",
        )
        self._is_off = True
        return False

    def _say(self, what: str, why: str) -> None:
        self._host.events.add(what, NAME, why)

    def _contained(self, function: Callable[[], None]) -> None:
        """Call a part of the guard; if it fails, that is recorded, and the guard is off."""
        attempt(self._has_failed, function)

    def _has_failed(self, error: Exception) -> None:
        self._is_off = True
        self._withheld.show()
        why = f"switched off: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._host.events.add("failed", NAME, why, trace)

    # Weights

    def losses_arrived(self, losses: Sequence[float]) -> None:
        """Called some times a second with the losses read since."""
        self._running.hear(time.monotonic())
        why = self._losses.told(losses)
        if why is not None:
            self._say("noticed", why)
        if self._is_off or (not self._turned() and not self._has_acted):
            return
        if not all(map(math.isfinite, losses)):
            self._looks_at_weights = True
        if self._running.s >= self._snapshot_due_s:
            self._takes_snapshot = True
        if self._looks_at_weights or self._takes_snapshot:
            self._host.ask_for_boundary()

    def at_boundary(self) -> None:
        """Between two steps."""
        if not self._is_off and (self._looks_at_weights or self._takes_snapshot):
            self._contained(self._see_to_weights)

    def _see_to_weights(self) -> None:
        host = self._host
        is_suspect, self._looks_at_weights = self._looks_at_weights, False
        is_due, self._takes_snapshot = self._takes_snapshot, False
        began_s = time.monotonic()
        if is_due and not is_suspect and self._postpones():
            return
        if not weights_are_finite(host.roots):
            self._answer_weights()
            return
        if is_suspect:
            count = self._snapshot.restore_buffers(host.roots)
            if count:
                self._say("noticed", f"{count} buffers were not finite, set to their last copy")
        if is_due:
            why = self._snapshot.take(host.roots, host.optimizers)
            if why is not None and why not in self._said:
                self._said.add(why)
                self._say("skipped", f"no copy of the weights is made: {why}")
            self._snapshot_s = time.monotonic() - began_s
            period_s = max(SNAPSHOT_PERIOD_S, self._snapshot_s / SNAPSHOT_SHARE)
            self._snapshot_due_s = self._running.s + period_s

    def _postpones(self) -> bool:
        """Whether the first copy would cost too large a share of the run so far."""
        if self._snapshot_s is not None:
            return False
        host = self._host
        expected_s = size_bytes(host.roots, host.optimizers) / BYTES_PER_S
        self._snapshot_due_s = expected_s / SNAPSHOT_SHARE
        return self._running.s < self._snapshot_due_s

    def _answer_weights(self) -> None:
        """Weights are not finite in spite of the gate: after an update by hand, or an overflow."""
        if not self._answer("weights were not finite", self._turned()):
            return
        self._looks_at_weights = False
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            why = "one of several processes cannot go back alone"
        elif self._snapshot.restore():
            self._say("noticed", "weights were not finite, set back to their last copy")
            return
        else:
            why = "there is no copy to go back to"
        self._say("noticed", f"weights are not finite, and {why}")
        self._is_off = True


class LossWatch:
    """Compares the losses with those of the proof, once.

    Args:
        envelope: the horizon of the proof and its losses.
    """

    def __init__(self, envelope: Envelope) -> None:
        self._steps = envelope.steps
        self._sites = envelope.losses
        self._from = envelope.steps - max(envelope.steps // 4, 1)  # as in the proof
        self._seen = 0
        self._sums = [0.0] * len(envelope.losses)

    def told(self, losses: Sequence[float]) -> str | None:
        """The next losses; what is to be said of them, if anything."""
        why = None
        for loss in losses:
            if not self._sites or self._seen >= self._steps * len(self._sites):
                break
            step, site = divmod(self._seen, len(self._sites))
            self._seen += 1
            if step >= self._from:
                self._sums[site] += loss
            if self._seen == self._steps * len(self._sites):
                why = self._verdict()
        return why

    def _verdict(self) -> str | None:
        steps = self._steps - self._from
        for number, (site, total) in enumerate(zip(self._sites, self._sums, strict=True), 1):
            mean = total / steps
            if not mean <= site.final + FAR * site.margin:
                which = f" of backward call {number}" if len(self._sites) > 1 else ""
                return (
                    f"the loss{which} over steps {self._from} to {self._steps} is {mean:.6g}; when "
                    f"the plan was proven it was {site.final:.6g}, give or take {site.margin:.2g}"
                )
        return None


def _are_on_host(tensors: Iterable[torch.Tensor]) -> bool:
    return all(device.type in HOST_DEVICES for device in set(map(_device, tensors)))


def _joined(flags: Sequence[torch.Tensor]) -> torch.Tensor:
    """One flag on the device of the first: 1 where one of them is."""
    joined, *others = flags
    for flag in others:
        joined = torch.maximum(joined, flag.to(joined.device, non_blocking=True))
    return joined


def _zero_where(found: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
    """Set all gradients to zero if the flag is 1, as the device sees it."""
    with torch.no_grad():
        for grad in grads:
            values = values_of(grad)
            values.masked_fill_(found.to(values.device, non_blocking=True).bool(), 0)
