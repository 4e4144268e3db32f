"""The settings that are in place in a process, and how they are undone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Set

from flatout.intercept import dispatch
from flatout.intercept.containment import Failed, attempt, began_in_torch, report
from flatout.intercept.events import EventLog
from flatout.intercept.place import Undo


class AppliedSettings:
    """Applies knobs at boundaries between steps, and undoes them there.

    Args:
        apply: applies a setting of a knob, given both names; returns the undo.
        events: of the record of this process.
        ask_for_boundary: asks to be stopped at the next boundary between two steps.

    Attributes:
        failures: why each knob that has failed in use did so.
        ever: names of all knobs that have been in place.
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
        """Knobs that are in place."""
        return self._undos.keys()

    def apply(self, knob: str, setting: str) -> None:
        """Apply a setting; called at a step boundary or before the first step.

        Raises:
            RefusedError: the knob can do nothing here.
        """
        dispatch.applying = knob
        try:
            self._undos[knob] = self._apply(knob, setting)
        finally:
            dispatch.applying = None
        self.ever.add(knob)

    def undo(self, knob: str) -> bool:
        """Undo what ``apply`` did; returns whether there was anything to undo."""
        undo = self._undos.pop(knob, None)
        if undo is not None:
            undo()
        return undo is not None

    def withdraw(self, knob: str, error: Exception) -> None:
        """A knob has failed in use: it is recorded, and undone at the next step boundary.

        Until then the knob itself leaves everything to the program.
        """
        if knob in self.failures:
            return
        self.failures[knob] = f"{type(error).__name__}: {error}"
        self._ask_for_boundary()
        self._events.failed(knob, error, "turned back: ")

    def withdraws(self, knob: str) -> Failed:
        """``withdraw`` of a knob, for ``containment``."""
        return functools.partial(self.withdraw, knob)

    def blames(self, knob: str) -> Blame:
        """Around the program's own pass under a knob: an exception goes through as it is, and if it
        began in torch, the knob is withdrawn for what follows.
        """
        return Blame(self.withdraws(knob))

    def undo_withdrawn(self) -> None:
        """Undo the knobs that have failed; called at a step boundary."""
        for knob in self.failures:
            if knob in self._undos and attempt(
                functools.partial(self._not_undone, knob), self.undo, knob
            ):
                self._events.add("undone", knob, "it has failed")

    def _not_undone(self, knob: str, error: Exception) -> None:
        self._events.failed(knob, error, "not undone: ")


class Blame:
    """A context in which a knob is withdrawn where torch fails under it.

    Args:
        withdraw: told of the error.
    """

    def __init__(self, withdraw: Failed) -> None:
        self._withdraw = withdraw

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and attempt(self._withdraw, began_in_torch, error):
            report(self._withdraw, error)
