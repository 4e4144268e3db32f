"""The interface of knobs and of the agent's stages to the process that is being tuned.

Through a host, a knob adds callbacks around the program's calls, finds the objects that the program
has created and the settings that are applied, and adds events.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flatout.intercept import dispatch
from flatout.intercept.applied import AppliedSettings
from flatout.intercept.containment import knob_of
from flatout.intercept.events import EventLog
from flatout.intercept.hooks import Hooks
from flatout.intercept.identity import WeakIdentitySet
from flatout.intercept.losses import start_loss_copy
from flatout.intercept.patch import Undo
from flatout.intercept.resting import RestingOperators
from flatout.wire.lines import Captured
from flatout.wire.request import Request
from flatout.wire.turns import ARM, MARK, MARKS, PAUSE, Turn, Turns
from flatout.wire.writer import RecordWriter

T = TypeVar("T")

Apply = Callable[[str, "Host", str], Undo]
"""Applies a setting of a knob; called with the knob's name, the host and the setting; returns the
undo."""


class Host:
    """One process under flatout.

    Args:
        request: the controller's request.
        record: the record of this process.
        apply: applies a setting of a knob.
        on_step: called with the closed turn at each step boundary, while ``hooks.tracks_steps`` is
            on; by default, knobs that have been withdrawn are undone.
        on_readable: called when ``hooks.read`` may be called.
        on_watch_failure: called with a subject and an exception when watching has failed; by
            default, an event is added.

    Attributes:
        events: the event log.
        applied: the settings that are applied.
        forward_wrappers: the wrappers around outermost module calls; see
            ``callbacks.ForwardWrapper``.
        backward_wrappers: the wrappers around backward calls; see ``callbacks.BackwardWrapper``.
        before_optimizer_step, after_optimizer_step: the callbacks around optimizer steps; see
            ``callbacks.OptimizerCallback``.
        optimizers_with_finite_gradients: the optimizers about to step whose gradients a knob has
            found to be finite.
    """

    def __init__(
        self,
        request: Request,
        record: RecordWriter,
        apply: Apply,
        on_step: Callable[[Turn], None] | None = None,
        on_readable: Callable[[], None] = lambda: None,
        on_watch_failure: Callable[[str, Exception], None] | None = None,
    ) -> None:
        self.request = request
        self.record = record
        self.events = EventLog(record)
        self.hooks = Hooks(
            lambda optimizer_exists: Turns(self._close_step, optimizer_exists),
            on_readable,
            start_loss_copy,
            on_skip=lambda subject, why: self.events.add("skipped", subject, why),
            on_failure=on_watch_failure or self.events.add_failure,
            on_callback_failure=self._withdraw_callback,
        )
        callbacks = self.hooks.callbacks
        self.forward_wrappers = callbacks.forward_wrappers
        self.backward_wrappers = callbacks.backward_wrappers
        self.before_optimizer_step = callbacks.before_optimizer_step
        self.after_optimizer_step = callbacks.after_optimizer_step
        dispatch.ask_for_rest = RestingOperators(
            self.forward_wrappers,
            self.before_optimizer_step,
            lambda: self.hooks.optimizer_exists,
        ).ask
        self.applied = AppliedSettings(
            lambda knob, setting: apply(knob, self, setting), self.events, self.ask_for_boundary
        )
        self.optimizers_with_finite_gradients: WeakIdentitySet[Any] = WeakIdentitySet()
        self._on_step = on_step or self._undo_withdrawn
        self._kept: dict[tuple[str, str], Any] = {}
        self._arm: int | None = None
        self._mark: str | None = None

    # The program's objects

    @property
    def roots(self) -> list[Any]:
        """The modules that were called outermost so far and are still alive."""
        return self.hooks.root_search.roots

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers that were built so far and are still alive."""
        return list(self.hooks.optimizers)

    @property
    def loaders(self) -> list[Any]:
        """The data loaders that were iterated over so far and are still alive."""
        return list(self.hooks.loaders)

    def counts_as_step(self, turn: Turn) -> bool:
        """Whether a closed turn is a step of the program: of training, or of inference if the
        program does not train. An evaluation pass of a program that trains is no step."""
        return turn.kind == "step" or not self.hooks.turns.may_train()

    def ask_for_boundary(self) -> bool:
        """Request a call of ``on_step`` at the next step boundary.

        Returns:
            Whether step tracking was off until now; the first step reported may then be partial.
        """
        was_off = not self.hooks.tracks_steps
        self.hooks.tracks_steps = self.hooks.live = True
        return was_off

    def keep(self, knob: str, name: str, make: Callable[[], T]) -> T:
        """Return a value that survives undoing and re-applying a knob.

        Args:
            knob: the name of the knob.
            name: the key of the value, unique within the knob.
            make: creates the value; called on first use.
        """
        if (knob, name) not in self._kept:
            self._kept[knob, name] = make()
        value: T = self._kept[knob, name]
        return value

    # Labels of steps

    @property
    def arm(self) -> int | None:
        """The comparison arm to which steps that end from now on are assigned."""
        return self._arm

    @arm.setter
    def arm(self, arm: int | None) -> None:
        self._arm = arm
        self.hooks.append_note(ARM, -1 if arm is None else arm)

    @property
    def mark(self) -> str | None:
        """The mark (one of ``turns.MARKS``) of steps that end from now on."""
        return self._mark

    @mark.setter
    def mark(self, mark: str | None) -> None:
        self._mark = mark
        self.hooks.append_note(MARK, MARKS.index(mark))

    def add_pause(self, since_ns: int) -> None:
        """Take the time since a reading of ``time.perf_counter_ns`` out of the current turn,
        because the agent has held up the program."""
        self.hooks.append_note(PAUSE, time.perf_counter_ns() - since_ns)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Return a context in which a knob captures or compiles a part of the program, once and for
        all: the time is recorded, and is not part of the current step."""
        begin_ns = time.perf_counter_ns()
        try:
            yield
        finally:
            self.add_pause(begin_ns)
            end_ns = time.perf_counter_ns()
            at_s = round(self.record.seconds(end_ns), 6)
            self.record.write(Captured((end_ns - begin_ns) / 1e9, at_s))

    # Callbacks of the hooks

    def _close_step(self, turn: Turn) -> None:
        if self.hooks.root_search.is_active:
            trains = bool(turn.backwards or turn.updates) or not self.hooks.optimizer_exists
            self.hooks.root_search.close_step(trains)
        self._on_step(turn)

    def _undo_withdrawn(self, turn: Turn) -> None:
        self.applied.undo_withdrawn(turn)

    def _withdraw_callback(self, callback: Any, error: Exception) -> None:
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
