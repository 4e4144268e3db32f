"""Comparing the losses of a run with the losses in the proof of its plan."""

from __future__ import annotations

from collections.abc import Sequence

from flatout.wire.request import GuardRequest

TOLERATED_DEVIATIONS = 10.0
"""The number of standard deviations by which a loss may exceed that of the proof without a warning.
With a standard deviation estimated from four seeds, a loss exceeds this limit by chance in one run
of a thousand (one-sided t distribution with 3 degrees of freedom: 10.2)."""


class LossWatch:
    """Compares the mean loss over the last quarter of the proof's steps with that in the proof,
    once.

    Args:
        envelope: the number of steps of the proof, and its losses.
    """

    def __init__(self, envelope: GuardRequest) -> None:
        self._steps = envelope.steps
        self._proven = envelope.losses
        self._first_step = envelope.steps - max(envelope.steps // 4, 1)  # as in the proof
        self._losses_seen = 0
        self._sums = [0.0] * len(envelope.losses)

    def add(self, losses: Sequence[float]) -> str | None:
        """Add the next losses.

        Args:
            losses: the losses in the order of the backward calls; each step has as many losses as a
                step of the proof.

        Returns:
            A warning, if these losses complete the comparison and the mean is too large.
        """
        why = None
        for loss in losses:
            if not self._proven or self._losses_seen >= self._steps * len(self._proven):
                break
            step, call = divmod(self._losses_seen, len(self._proven))
            self._losses_seen += 1
            if step >= self._first_step:
                self._sums[call] += loss
            if self._losses_seen == self._steps * len(self._proven):
                why = self._compare()
        return why

    def _compare(self) -> str | None:
        steps = self._steps - self._first_step
        for number, (proven, total) in enumerate(zip(self._proven, self._sums, strict=True), 1):
            mean = total / steps
            if not mean <= proven.final + TOLERATED_DEVIATIONS * proven.margin:
                which = f" of backward call {number}" if len(self._proven) > 1 else ""
                return (
                    f"the loss{which} over steps {self._first_step} to {self._steps} is "
                    f"{mean:.6g}, far above {proven.final:.6g}, which it was when the plan was "
                    f"proven (standard deviation {proven.margin:.2g})"
                )
        return None
