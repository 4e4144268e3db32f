"""What the guard does when gradients or weights are not finite."""

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
"""Classes of settings that are withdrawn together, in this order."""


class NotFiniteError(ArithmeticError):
    """Gradients or weights are infinite or NaN."""


class Responder:
    """Withdraws knobs, or switches the guard off if the program itself is the cause.

    Args:
        host: of this process, its settings applied.
        turned_off: called when the guard is switched off by a failure of its own.

    Attributes:
        is_off: whether the guard is switched off.
        has_withdrawn: whether it has withdrawn a knob.
        suspects_weights: whether the weights must be checked at the next step boundary.
    """

    def __init__(self, host: Host, turned_off: Callable[[], None]) -> None:
        self.is_off = False
        self.has_withdrawn = False
        self.suspects_weights = False
        self._host = host
        self._turned_off = turned_off
        self._classes = {
            name: knobs.get(name).exactness[setting]
            for name, setting in host.request.settings.items()
            if not knobs.is_bitwise(name, setting)
        }

    def suspects(self) -> frozenset[str]:
        """Return the knobs that are applied and may change results."""
        return frozenset(self._host.applied.names & self._classes.keys())

    def is_needed(self) -> bool:
        """Whether anything may have to be kept from the weights."""
        return bool(self.suspects()) or self.has_withdrawn

    def respond(self, what: str, suspects: Collection[str]) -> bool:
        """Withdraw knobs; returns whether the guard goes on keeping non-finite values away.

        Args:
            what: says what was not finite, as the beginning of a sentence.
            suspects: the knobs that were applied when it was computed.
        """
        host = self._host
        self.suspects_weights = True
        host.ask_for_boundary()
        if any(knob in host.applied.failures for knob in suspects):
            return True  # it was computed before these knobs were undone
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
        """Call a part of the guard; if it fails, the failure is recorded and the guard is off."""
        attempt(self.on_failure, function)

    def on_failure(self, error: Exception) -> None:
        """Switch the guard off after a failure of its own."""
        self.is_off = True
        self._turned_off()
        why = f"switched off: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._host.events.add("failed", NAME, why, trace)
