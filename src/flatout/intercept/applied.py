"""The settings that are applied in a process, and how they are undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure, attempt, report, was_raised_by_torch
from flatout.intercept.events import EventLog
from flatout.intercept.patch import Undo


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
        ask_for_boundary: Callable[[], None],
    ) -> None:
        self.failures: dict[str, str] = {}
        self.ever: set[str] = set()
        self._apply = apply
        self._events = events
        self._ask_for_boundary = ask_for_boundary
        self._undos: dict[str, Undo] = {}

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
        """Record that a knob has failed in use, and undo it at the next step boundary.

        Until then, the knob itself passes every call on to the original function.
        """
        if knob in self.failures:
            return
        self.failures[knob] = f"{type(error).__name__}: {error}"
        self._ask_for_boundary()
        self._events.add_failure(knob, error, "withdrawn: ")

    def on_failure_of(self, knob: str) -> OnFailure:
        """Return the callback that withdraws a knob when it fails, for ``containment``."""
        return functools.partial(self.withdraw, knob)

    def withdraw_on_torch_error(self, knob: str) -> WithdrawOnTorchError:
        """Return a context for the program's own forward pass with a knob applied.

        An exception leaves the context unchanged. If torch raised it, the knob is withdrawn.
        """
        return WithdrawOnTorchError(self.on_failure_of(knob))

    def undo_withdrawn(self) -> None:
        """Undo the knobs that have been withdrawn. To be called at a step boundary."""
        for knob in self.failures:
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
