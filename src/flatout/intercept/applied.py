"""The settings that are applied in a process, and how they are undone."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Set

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure, attempt, report, was_raised_by_torch
from flatout.intercept.events import EventLog
from flatout.intercept.patch import Undo
from flatout.wire.turns import Turn


class AppliedSettings:
    """Applies and undoes the settings of knobs at step boundaries.

    Args:
        apply: applies a setting of a knob, given both names, and returns the undo.
        events: the event log of this process.
        ask_for_boundary: requests a call at the next step boundary.

    Attributes:
        failures: the error of each knob that has failed in use, by the knob's name.
        ever: names of all knobs that have been applied so far.
    """

    def __init__(
        self,
        apply: Callable[[str, str], Undo],
        events: EventLog,
        ask_for_boundary: Callable[[], bool],
    ) -> None:
        self.failures: dict[str, str] = {}
        self.ever: set[str] = set()
        self._apply = apply
        self._events = events
        self._ask_for_boundary = ask_for_boundary
        self._undos: dict[str, Undo] = {}
        self._withdrawn_ns = 0
        self._awaits_whole_step = False

    @property
    def names(self) -> Set[str]:
        """The knobs that are applied now."""
        return self._undos.keys()

    def apply(self, knob: str, setting: str) -> None:
        """Apply a setting. To be called at a step boundary, or before the first step.

        Raises:
            RefusedError: the knob cannot do anything in this process.
        """
        dispatch.knob_being_applied = knob
        try:
            self._undos[knob] = self._apply(knob, setting)
        finally:
            dispatch.knob_being_applied = None
        self.ever.add(knob)

    def undo(self, knob: str) -> bool:
        """Undo ``apply``; returns whether the knob was applied."""
        undo = self._undos.pop(knob, None)
        if undo is not None:
            undo()
        return undo is not None

    def withdraw(self, knob: str, error: Exception) -> None:
        """Record that a knob has failed in use, and undo it at a later step boundary.

        Until then it stays in place; where it fails again, the original function is called.
        """
        if knob in self.failures:
            return
        self.failures[knob] = f"{type(error).__name__}: {error}"
        self._withdrawn_ns = time.perf_counter_ns()
        self._awaits_whole_step |= self._ask_for_boundary()
        self._events.add_failure(knob, error, "withdrawn: ")

    def on_failure_of(self, knob: str) -> OnFailure:
        """Return the callback that withdraws a knob when it fails, for ``containment``."""
        return functools.partial(self.withdraw, knob)

    def withdraw_on_torch_error(self, knob: str) -> WithdrawOnTorchError:
        """Return a context for the program's own forward pass with a knob applied.

        An exception leaves the context unchanged. If torch raised it, the knob is withdrawn.
        """
        return WithdrawOnTorchError(self.on_failure_of(knob))

    @property
    def has_withdrawn(self) -> bool:
        """Whether a knob that has been withdrawn is still in place."""
        return not self.failures.keys().isdisjoint(self._undos)

    def undo_withdrawn(self, step: Turn) -> None:
        """Undo the knobs that have been withdrawn, if this is a boundary between two steps.

        Boundaries may be told late, so one that lies before the withdrawal is none any more. And
        where steps are followed only since then, the first one may begin and end in the middle of
        a step of the program, between its two optimizers say, so the second one is waited for.

        Args:
            step: the step that has closed.
        """
        if step.end_ns < self._withdrawn_ns:
            return
        if self._awaits_whole_step:
            self._awaits_whole_step = False
            return
        for knob in list(self.failures):
            if knob in self._undos and attempt(
                functools.partial(self._undo_failed, knob), self.undo, knob
            ):
                self._events.add("undone", knob, "it has failed")

    def _undo_failed(self, knob: str, error: Exception) -> None:
        self._events.add_failure(knob, error, "not undone: ")


class WithdrawOnTorchError:
    """A context that reports exceptions raised by torch inside it, and raises them unchanged.

    Args:
        on_failure: called with such an exception.
    """

    def __init__(self, on_failure: OnFailure) -> None:
        self._on_failure = on_failure

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and attempt(self._on_failure, was_raised_by_torch, error):
            report(self._on_failure, error)
