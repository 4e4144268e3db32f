"""The process that is being tuned, as knobs and the agent's stages see it.

A knob acts through a host: it adds callbacks around the program's calls, looks at the objects that
the program has created and at the settings that are applied, and adds events.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flatout.intercept.applied import AppliedSettings
from flatout.intercept.containment import knob_of
from flatout.intercept.events import EventLog
from flatout.intercept.hooks import Hooks
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.losses import read_loss
from flatout.intercept.patch import Undo
from flatout.wire.request import Request
from flatout.wire.turns import ARM, MARK, MARKS, Turn, Turns
from flatout.wire.writer import RecordWriter

T = TypeVar("T")

Apply = Callable[[str, "Host", str], Undo]
"""Applies a knob, given by its name, to a host, with a setting; returns the undo."""


class Host:
    """One process under flatout.

    Args:
        request: what the controller asks for.
        record: the record of this process.
        apply: applies a knob, given by its name.
        step_closed: called at each step boundary while ``hooks.tracks_steps`` is on; by default, it
            undoes the knobs that have been withdrawn.
        may_read: called when ``hooks.read`` may be called.
        watch_failed: called with a subject and an exception when watching has failed; by default,
            it adds an event.

    Attributes:
        events: the event log.
        applied: the settings that are applied.
        forward_wrappers: called around each outermost module call, as
            ``wrapper(call, module, args, kwargs)``.
        backward_wrappers: called around each backward call; see ``callbacks.BackwardWrapper``.
        before_optimizer_step, after_optimizer_step: called with the optimizer around each step.
        checked_gradients: optimizers about to step whose gradients a knob has found to be finite.
    """

    def __init__(
        self,
        request: Request,
        record: RecordWriter,
        apply: Apply,
        step_closed: Callable[[Turn], None] | None = None,
        may_read: Callable[[], None] = lambda: None,
        watch_failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.request = request
        self.record = record
        self.events = EventLog(record)
        self.hooks = Hooks(
            lambda optimizer_exists: Turns(self._close_step, optimizer_exists),
            may_read,
            read_loss,
            on_skip=lambda subject, why: self.events.add("skipped", subject, why),
            on_failure=watch_failed or self.events.add_failure,
            on_callback_failure=self._callback_failed,
        )
        callbacks = self.hooks.callbacks
        self.forward_wrappers = callbacks.forward_wrappers
        self.backward_wrappers = callbacks.backward_wrappers
        self.before_optimizer_step = callbacks.before_optimizer_step
        self.after_optimizer_step = callbacks.after_optimizer_step
        self.applied = AppliedSettings(
            lambda knob, setting: apply(knob, self, setting), self.events, self.ask_for_boundary
        )
        self.checked_gradients: WeakIdentitySet[Any] = WeakIdentitySet()
        self._step_closed = step_closed or self._undo_withdrawn
        self._kept: dict[tuple[str, str], Any] = {}
        self._arm: int | None = None
        self._mark: str | None = None

    # The program's objects

    @property
    def roots(self) -> list[Any]:
        """The living modules that were called outermost so far."""
        return self.hooks.root_search.roots

    @property
    def optimizers(self) -> list[Any]:
        """The living optimizers that were built so far."""
        return list(self.hooks.optimizers)

    @property
    def loaders(self) -> list[Any]:
        """The living data loaders that were iterated over so far."""
        return list(self.hooks.loaders)

    def counts_as_step(self, turn: Turn) -> bool:
        """Whether a closed turn is a step of training, or of inference in a program that does not
        train; an evaluation pass of a program that trains is neither."""
        return turn.kind == "step" or not self.hooks.turns.may_train()

    def ask_for_boundary(self) -> bool:
        """Have ``step_closed`` called at the next step boundary.

        Returns:
            Whether steps are followed only from now on, so that the first one may be no whole step.
        """
        begins_now = not self.hooks.tracks_steps
        self.hooks.tracks_steps = self.hooks.live = True
        return begins_now

    def keep(self, knob: str, name: str, make: Callable[[], T]) -> T:
        """Return what a knob keeps of this process from one time it is applied to the next.

        Args:
            knob: the knob's name.
            name: tells apart what one knob keeps.
            make: called to make the value if there is none yet.
        """
        if (knob, name) not in self._kept:
            self._kept[knob, name] = make()
        value: T = self._kept[knob, name]
        return value

    # Labels of steps

    @property
    def arm(self) -> int | None:
        """The arm of the comparison that steps closing from now on belong to."""
        return self._arm

    @arm.setter
    def arm(self, arm: int | None) -> None:
        self._arm = arm
        self.hooks.note(ARM, -1 if arm is None else arm)

    @property
    def mark(self) -> str | None:
        """The mark (one of ``turns.MARKS``) of the steps closing from now on."""
        return self._mark

    @mark.setter
    def mark(self, mark: str | None) -> None:
        self._mark = mark
        self.hooks.note(MARK, MARKS.index(mark))

    # Callbacks of the hooks

    def _close_step(self, turn: Turn) -> None:
        if self.hooks.root_search.is_active:
            self.hooks.root_search.close_step()
        self._step_closed(turn)

    def _undo_withdrawn(self, turn: Turn) -> None:
        self.applied.undo_withdrawn(turn)

    def _callback_failed(self, callback: Any, error: Exception) -> None:
        """Remove a callback that has failed, and withdraw its knob."""
        for callbacks in (
            self.forward_wrappers,
            self.backward_wrappers,
            self.before_optimizer_step,
            self.after_optimizer_step,
        ):
            callbacks.remove(callback)
        knob = knob_of(callback)
        if knob is not None:
            self.applied.withdraw(knob, error)
        else:
            subject = getattr(callback, "__qualname__", type(callback).__qualname__)
            self.events.add_failure(subject, error)
