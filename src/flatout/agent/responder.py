"""Responding to gradients or weights that are not finite."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from flatout import knobs
from flatout.intercept.containment import attempt
from flatout.knob import Exactness

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "guard"

WITHDRAWN_FIRST: tuple[frozenset[Exactness], ...] = (
    frozenset({"reduced"}),
    frozenset({"reordered", "resampled", "reshuffled"}),
)
"""Groups of classes of settings. The settings of one group are withdrawn together; the groups are
tried in this order."""


class NotFiniteError(ArithmeticError):
    """Gradients or weights are infinite or NaN."""


class Responder:
    """Withdraws knobs, or switches the guard off if the program itself is the cause.

    Args:
        host: the host of this process; its settings have been applied.
        on_switch_off: called when a failure of the guard itself switches the guard off.

    Attributes:
        is_off: whether the guard is switched off.
        has_withdrawn: whether the guard has withdrawn a knob.
        suspects_weights: whether the weights must be checked at the next step boundary.
    """

    def __init__(self, host: Host, on_switch_off: Callable[[], None]) -> None:
        self.is_off = False
        self.has_withdrawn = False
        self.suspects_weights = False
        self._host = host
        self._on_switch_off = on_switch_off
        self._classes = {
            name: knobs.get(name).exactness[setting]
            for name, setting in host.request.settings.items()
            if not knobs.is_bitwise(name, setting)
        }

    def suspects(self) -> frozenset[str]:
        """Return the names of the applied knobs that may change results."""
        return frozenset(self._host.applied.names & self._classes.keys())

    def is_needed(self) -> bool:
        """Whether a knob may cause, or has caused, values that must be kept from the weights."""
        return bool(self.suspects()) or self.has_withdrawn

    def respond(self, what: str, suspects: Collection[str]) -> bool:
        """Withdraw knobs, or switch the guard off if no knob can be the cause.

        Args:
            what: the beginning of a sentence that says what was not finite.
            suspects: the knobs that were applied when the values were computed.

        Returns:
            Whether the guard is still on.
        """
        host = self._host
        self.suspects_weights = True
        host.ask_for_boundary()
        if any(knob in host.applied.failures for knob in suspects):
            return True  # the values were computed before these knobs were undone
        for classes in WITHDRAWN_FIRST:
            blamed = [knob for knob in suspects if self._classes[knob] in classes]
            if blamed:
                self.has_withdrawn = True
                for knob in sorted(blamed):
                    host.applied.withdraw(knob, NotFiniteError(what))
                return True
        self.say(
            "noticed",
            f"{what} without any setting that changes results, so they are the program's own: the "
            "guard is switched off",
        )
        self.is_off = True
        return False

    def say(self, what: str, why: str) -> None:
        """Add an event of the guard."""
        self._host.events.add(what, NAME, why)

    def attempt(self, function: Callable[[], None]) -> None:
        """Call a part of the guard. If it fails, record the failure and switch the guard off."""
        attempt(self.on_failure, function)

    def on_failure(self, error: Exception) -> None:
        """Record a failure of the guard itself, and switch the guard off."""
        self.is_off = True
        self._on_switch_off()
        why = f"switched off: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._host.events.add("failed", NAME, why, trace)
