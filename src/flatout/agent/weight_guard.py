"""The part of the guard that checks the weights between two steps, and keeps a copy of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from flatout.agent.snapshot import Snapshot, size_bytes, weights_are_finite

if TYPE_CHECKING:
    from flatout.agent.responder import Responder
    from flatout.intercept.host import Host

SNAPSHOT_PERIOD_S = 30.0
SNAPSHOT_SHARE = 0.005
"""Running time between two copies of the weights, longer where copying would take more than this
share of the running time."""

PAUSE_S = 1.0
"""The program counts as paused (stopped, or the machine suspended) during a gap between two signs
of life that is longer than this and more than twice as long as the gap before. What exceeds both
limits does not count as running time."""

BYTES_PER_S = 1e9
"""Assumed rate of the first copy: slow, for any memory."""


class RunningTime:
    """How long the program has run, without its pauses.

    Attributes:
        s: seconds so far.
    """

    def __init__(self) -> None:
        self.s = 0.0
        self._last_sign_s = time.monotonic()
        self._gap_s = 0.0

    def add_sign_of_life(self, now_s: float) -> None:
        """Note that the program runs at this time of ``time.monotonic``."""
        self._gap_s = min(now_s - self._last_sign_s, max(PAUSE_S, 2 * self._gap_s))
        self._last_sign_s = now_s
        self.s += self._gap_s


class WeightGuard:
    """Restores weights and buffers that have become infinite or NaN.

    That happens in spite of the checks of gradients if the program updates weights by hand, or if
    an update overflows.

    Args:
        host: of this process.
        responder: withdraws knobs.
    """

    def __init__(self, host: Host, responder: Responder) -> None:
        self._host = host
        self._responder = responder
        self._snapshot = Snapshot()
        self._snapshot_s: float | None = None
        self._running = RunningTime()
        self._snapshot_due_s = SNAPSHOT_PERIOD_S
        self._takes_snapshot = False
        self._reasons_given: set[str] = set()

    def losses_arrived(self, losses: Sequence[float]) -> None:
        """Decide whether the weights are to be checked or copied at the next step boundary.

        Args:
            losses: those that have been read since the last call; it is called some times a second.
        """
        self._running.add_sign_of_life(time.monotonic())
        responder = self._responder
        if responder.is_off or not responder.is_needed():
            return
        if not all(map(math.isfinite, losses)):
            responder.suspects_weights = True
        if self._running.s >= self._snapshot_due_s:
            self._takes_snapshot = True
        if responder.suspects_weights or self._takes_snapshot:
            self._host.ask_for_boundary()

    def at_boundary(self) -> None:
        """Check and copy the weights, between two steps, if either is due."""
        responder = self._responder
        if not responder.is_off and (responder.suspects_weights or self._takes_snapshot):
            responder.attempt(self._check_weights)

    def _check_weights(self) -> None:
        host, responder = self._host, self._responder
        is_suspect, responder.suspects_weights = responder.suspects_weights, False
        is_due, self._takes_snapshot = self._takes_snapshot, False
        began_s = time.monotonic()
        if is_due and not is_suspect and self._postpones():
            return
        if not weights_are_finite(host.roots):
            self._respond()
            return
        if is_suspect:
            count = self._snapshot.restore_buffers(host.roots)
            if count:
                responder.say(
                    "noticed", f"{count} buffers were not finite: restored from their last copy"
                )
        if is_due:
            why = self._snapshot.take(host.roots, host.optimizers)
            if why is not None and why not in self._reasons_given:
                self._reasons_given.add(why)
                responder.say("skipped", f"the weights are not copied: {why}")
            self._snapshot_s = time.monotonic() - began_s
            period_s = max(SNAPSHOT_PERIOD_S, self._snapshot_s / SNAPSHOT_SHARE)
            self._snapshot_due_s = self._running.s + period_s

    def _postpones(self) -> bool:
        """Whether the first copy would still take too large a share of the running time."""
        if self._snapshot_s is not None:
            return False
        host = self._host
        expected_s = size_bytes(host.roots, host.optimizers) / BYTES_PER_S
        self._snapshot_due_s = expected_s / SNAPSHOT_SHARE
        return self._running.s < self._snapshot_due_s

    def _respond(self) -> None:
        """Withdraw knobs and restore the weights, or switch the guard off if that is impossible."""
        responder = self._responder
        if not responder.respond("weights were not finite", responder.suspects()):
            return
        responder.suspects_weights = False
        if self._host.request.ranks is not None or (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            why = "one of several processes cannot restore them alone"
        elif self._snapshot.restore():
            responder.say("noticed", "weights were not finite: restored from their last copy")
            return
        else:
            why = "there is no copy to restore"
        responder.say("noticed", f"weights are not finite, and {why}")
        responder.is_off = True
