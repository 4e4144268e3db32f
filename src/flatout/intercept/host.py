"""The process that is being tuned, as knobs and the agent's stages see it.

A knob acts through what stands here: callbacks around the program's calls, the objects that the
program has made, the settings that are in place, and the event log.
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
from flatout.intercept.place import Undo
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
        record: of this process.
        apply: how a knob is applied, by its name.
        turn_closed: called as each turn closes, as long as ``hooks`` tell of them; by default, the
            knobs that have failed are undone.
        may_read: called when the log of ``hooks`` may be read.
        watch_failed: called with a subject and an error when what watches has failed.

    Attributes:
        events: of the record, for what a user should know.
        applied: the settings that are in place.
        forward_wrappers: called around each outermost module call, as
            ``wrapper(call, module, args, kwargs)``; the way for a knob to act on the forward pass.
        backward_wrappers: called around each backward call; see ``hooks.BackwardWrapper``.
        before_optimizer_step, after_optimizer_step: called with the optimizer around each step.
        checked_gradients: optimizers about to step whose gradients a knob has found to be finite.
    """

    def __init__(
        self,
        request: Request,
        record: RecordWriter,
        apply: Apply,
        turn_closed: Callable[[Turn], None] | None = None,
        may_read: Callable[[], None] = lambda: None,
        watch_failed: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.request = request
        self.record = record
        self.events = EventLog(record)
        self.hooks = Hooks(
            lambda optimizer_exists: Turns(self._turn_closed, optimizer_exists),
            may_read,
            read_loss,
            on_skip=lambda subject, why: self.events.add("skipped", subject, why),
            on_failure=watch_failed or self.events.failed,
            on_callback_failure=self._callback_failed,
        )
        self.forward_wrappers = self.hooks.forward_wrappers
        self.backward_wrappers = self.hooks.backward_wrappers
        self.before_optimizer_step = self.hooks.before_optimizer_step
        self.after_optimizer_step = self.hooks.after_optimizer_step
        self.applied = AppliedSettings(
            lambda knob, setting: apply(knob, self, setting), self.events, self.ask_for_boundary
        )
        self.checked_gradients: WeakIdentitySet[Any] = WeakIdentitySet()
        self._tell_turn = turn_closed or self._at_boundary
        self._kept: dict[tuple[str, str], Any] = {}
        self._arm: int | None = None
        self._mark: str | None = None

    # What the program has made

    @property
    def roots(self) -> list[Any]:
        """Living modules that were called outermost so far."""
        return self.hooks.roots

    @property
    def optimizers(self) -> list[Any]:
        """Living optimizers that have stepped so far."""
        return list(self.hooks.optimizers)

    @property
    def loaders(self) -> list[Any]:
        """Living data loaders that were iterated over so far."""
        return list(self.hooks.loaders)

    def counts(self, turn: Turn) -> bool:
        """Whether a turn is a step of the program: of its training, or, if none, of inference."""
        return turn.kind == "step" or not self.hooks.turns.may_train()

    def ask_for_boundary(self) -> None:
        """Stop at the next boundary between two steps, for what is waiting to be done there."""
        self.hooks.told = self.hooks.live = True

    def kept(self, knob: str, name: str, make: Callable[[], T]) -> T:
        """What a knob keeps of this process, under a name, from one time it is applied to the next.

        Args:
            knob: whose it is.
            name: of what is kept.
            make: makes it, the first time.
        """
        if (knob, name) not in self._kept:
            self._kept[knob, name] = make()
        found: T = self._kept[knob, name]
        return found

    # Which steps these are

    @property
    def arm(self) -> int | None:
        """The arm that the turns closing from now on belong to."""
        return self._arm

    @arm.setter
    def arm(self, arm: int | None) -> None:
        self._arm = arm
        self.hooks.note(ARM, -1 if arm is None else arm)

    @property
    def mark(self) -> str | None:
        """The mark (one of ``turns.MARKS``) of the turns closing from now on."""
        return self._mark

    @mark.setter
    def mark(self, mark: str | None) -> None:
        self._mark = mark
        self.hooks.note(MARK, MARKS.index(mark))

    def _turn_closed(self, turn: Turn) -> None:
        if self.hooks.searching:
            self.hooks.turn_closed()
        self._tell_turn(turn)

    def _at_boundary(self, turn: Turn) -> None:
        self.applied.undo_withdrawn()

    def _callback_failed(self, callback: Any, error: Exception) -> None:
        """A wrapper around forward calls, or a callback around optimizer steps, has failed."""
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
            self.events.failed(subject, error)
