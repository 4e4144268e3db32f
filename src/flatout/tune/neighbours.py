"""Watches how much of the CPUs other processes use during a tune, and waits if they use much.

Before its first trial, a tune waits for a quiet stretch if others use much of the CPUs. Before each
later trial, it waits if others used much of the CPUs during the previous trial. All waits together
take at most ``WAIT_SHARE`` of the budget. After that, the tune goes on, however busy the CPUs are:
steps that others disturb do not count (``quiet.py``), and others that run at idle priority disturb
no steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flatout.launch import interruption
from flatout.machine import usage
from flatout.machine.usage import Usage
from flatout.tune import formatting
from flatout.wire.disturbance import TAKEN_LIMIT

WAIT_SHARE = 0.05
"""Maximum share of the budget that all waits of a tune take together."""

LONGEST_WAIT_S = 15.0
"""Maximum time that all waits of a tune take together, in seconds."""

LOOK_S = 0.3
"""How long the CPUs are watched before the first trial, in seconds."""

QUIET_S = 1.0
"""Others must use little of the CPUs for this long, in seconds, to make a quiet stretch."""


class Neighbours:
    """Watches how much others use of the CPUs that the trials of one tune may use.

    Args:
        budget_s: the budget of the tune, in seconds.
        print_line: prints a line of progress.
        read: takes a reading of CPU time.
        sleep: waits for some seconds.
    """

    def __init__(
        self,
        budget_s: float,
        print_line: Callable[[str], None],
        read: Callable[[], Usage] = usage.read,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._left_s = min(WAIT_SHARE * budget_s, LONGEST_WAIT_S)
        self._print_line = print_line
        self._read = read
        self._sleep = sleep
        self._before: Usage | None = None
        self._taken: float | None = None
        self._has_looked = self._has_said = False
        self._watched_s = self._taken_s = 0.0

    @property
    def mean_taken(self) -> float | None:
        """The mean share of the CPUs that others used while trials ran; ``None``: not measured."""
        return self._taken_s / self._watched_s if self._watched_s else None

    def before_trial(self) -> None:
        """Wait for a quiet stretch if others use much of the CPUs.

        Raises:
            KeyboardInterrupt: the user ends the tune.
        """
        if not self._has_looked:
            self._has_looked = True
            self._taken = self._look(LOOK_S)
        if self._taken is not None and self._taken > TAKEN_LIMIT:
            self._wait(self._taken)
        self._before = self._read()

    def after_trial(self) -> float | None:
        """Return the share of the CPUs that others used while the trial ran; ``None``: not
        measured."""
        if self._before is not None:
            after = self._read()
            self._taken = usage.taken_between(self._before, after)
            if self._taken is not None:
                seconds = (after.at_ns - self._before.at_ns) / 1e9
                self._watched_s += seconds
                self._taken_s += self._taken * seconds
        return self._taken

    def _wait(self, taken: float) -> None:
        if not self._has_said:
            self._has_said = True
            cpus = formatting.count(self._read().cpus, "CPU")
            self._print_line(
                f"other processes use {taken:.0%} of the {cpus} that this job may use; waiting "
                f"until they use less, for at most {formatting.duration(self._left_s)} in all"
            )
        waited_s = 0.0
        while self._left_s > 0:
            interruption.check()
            now = self._look(QUIET_S)
            waited_s += QUIET_S
            self._left_s -= QUIET_S
            if now is None or now <= TAKEN_LIMIT:
                self._print_line(f"the CPUs are quiet after {formatting.duration(waited_s)}")
                return
            taken = now
        if waited_s:
            self._print_line(
                f"other processes still use {taken:.0%} of the CPUs; going on: steps that they "
                "disturb do not count"
            )

    def _look(self, seconds: float) -> float | None:
        """Return the share of the CPUs that others use in the next ``seconds`` seconds."""
        before = self._read()
        self._sleep(seconds)
        return usage.taken_between(before, self._read())
