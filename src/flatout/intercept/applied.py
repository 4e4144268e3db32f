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
        ask_for_boundary: requests a call of ``undo_withdrawn`` at the next step boundary; returns
            whether steps are tracked only from now on.

    Attributes:
        failures: a map from the name of each knob that has failed in use to its error.
        ever_applied: the names of all knobs that have been applied so far.
    """

    def __init__(
        self,
        apply: Callable[[str, str], Undo],
        events: EventLog,
        ask_for_boundary: Callable[[], bool],
    ) -> None:
        self.failures: dict[str, str] = {}
        self.ever_applied: set[str] = set()
        self._apply = apply
        self._events = events
        self._ask_for_boundary = ask_for_boundary
        self._undos: dict[str, Undo] = {}
        self._withdrawn_ns = 0
        self._awaits_whole_step = False

    @property
    def names(self) -> Set[str]:
        """The names of the knobs that are applied now."""
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
        self.ever_applied.add(knob)

    def undo(self, knob: str) -> bool:
        """Undo ``apply``; returns whether the knob was applied."""
        undo = self._undos.pop(knob, None)
        if undo is not None:
            undo()
        return undo is not None

    def withdraw(self, knob: str, error: Exception) -> None:
        """Record that a knob has failed in use, and request that it is undone at a step boundary.

        Until then the knob stays applied. If it fails again, the original function is called.
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
        """Whether a knob that has been withdrawn is still applied."""
        return not self.failures.keys().isdisjoint(self._undos)

    def undo_withdrawn(self, step: Turn) -> None:
        """Undo the knobs that have been withdrawn, if the program is between two steps now.

        A boundary may be reported late. One that lies before the withdrawal is ignored. If step
        tracking only started at the withdrawal, the first detected step may be a fragment (for
        example the part of an iteration between the two optimizers of a GAN). The undo then waits
        for the second step.

        Args:
            step: the step that has ended.
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
    """A context that reports the exceptions that torch raises inside it, and re-raises them.

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
