"""Watches what other processes take of the CPUs while a tune runs, and waits until they are quiet.

If others use much of the CPUs before the first trial, or used much during a trial, the tune waits
for a quiet stretch before the next trial. All waits together take at most a share of its budget.
After that it goes on, however busy the CPUs are: steps that others disturb do not count
(``quiet.py``), and others that run at idle priority disturb none.
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
"""The share of the budget that a tune waits for quiet, in all."""

LONGEST_WAIT_S = 15.0
"""The longest that it waits in all, in seconds."""

LOOK_S = 0.3
"""For how long it looks before the first trial, in seconds."""

QUIET_S = 1.0
"""How long a quiet stretch lasts, in seconds."""


class Neighbours:
    """What others take of the CPUs that the jobs of one tune may use.

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
        """The share of the CPUs that others have used while trials ran; ``None``: not measured."""
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
                f"others use {taken:.0%} of the {cpus} that this job may use; waiting for a quiet "
                f"stretch, at most {formatting.duration(self._left_s)} in all"
            )
        waited_s = 0.0
        while self._left_s > 0:
            interruption.check()
            now = self._look(QUIET_S)
            waited_s += QUIET_S
            self._left_s -= QUIET_S
            if now is None or now <= TAKEN_LIMIT:
                self._print_line(f"it is quiet after {formatting.duration(waited_s)}")
                return
            taken = now
        if waited_s:
            self._print_line(
                f"others still use {taken:.0%} of the CPUs; going on: what they disturb does not "
                "count"
            )

    def _look(self, seconds: float) -> float | None:
        """Return what others take in the next seconds."""
        before = self._read()
        self._sleep(seconds)
        return usage.taken_between(before, self._read())
