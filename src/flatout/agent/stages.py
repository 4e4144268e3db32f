"""The stages of a run: what is done at step boundaries, one stage after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flatout.intercept.containment import attempt
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.profile import Profiler
    from flatout.intercept.host import Host

Stage = Callable[[Turn], bool]
"""Called at each step boundary with the step that has closed, until it returns true."""


class Stages:
    """The stages that a request asks for, in their order: timing, a comparison inside the process
    or with another one, and the profile.

    Args:
        host: of this process, whose request decides about the stages.
        stop: the last stage, which ends the process.

    Attributes:
        pending: the stages that are not over; the first one is running.
    """

    def __init__(self, host: Host, stop: Stage) -> None:
        self._host = host
        self._stop = stop
        self._profiler: Profiler | None = None
        self._steps_timed = 0
        self._timed_from_ns: int | None = None
        self.pending: list[Stage] = []

    def add_requested(self) -> None:
        """Add the stages that the request asks for. Some note their arm and mark at once."""
        host, request = self._host, self._host.request
        if request.comparison is not None:
            from flatout.agent.learning import Learner
            from flatout.agent.switch import Switch

            compares = Learner if request.learn else Switch
            self.pending.append(compares(host, request.comparison).at_boundary)
        elif request.relay is not None:
            from flatout.agent.relay import Runner

            self.pending.append(Runner(host, request.relay).at_boundary)
        elif request.stop_steps is not None or request.stop_seconds is not None:
            self.pending.append(self.time_step)
        if request.profile_steps:
            from flatout.agent.profile import Profiler

            self._profiler = Profiler(host, request.profile_steps)
            self.pending.append(self._profiler.at_boundary)
        if self.pending and not request.learn:
            self.pending.append(self._stop)

    def time_step(self, turn: Turn) -> bool:
        """Count a step; returns whether all steps that the request asks for have been timed."""
        if self._host.counts_as_step(turn):
            self._steps_timed += 1
        limit = self._host.request.stop_steps
        return limit is not None and self._steps_timed >= limit

    def run(self, turn: Turn) -> None:
        """Run the first stage, and after it those that begin at the same boundary.

        A stage that fails is over, with an event. The time limit of the request counts from the end
        of the first step on, since start-up and first step may compile; it ends only ``time_step``.
        """
        limit_s = self._host.request.stop_seconds
        if self._timed_from_ns is None:
            self._timed_from_ns = turn.end_ns
        is_late = limit_s is not None and turn.end_ns - self._timed_from_ns > limit_s * 1e9
        while self.pending:
            stage = self.pending[0]
            name = getattr(stage, "__qualname__", repr(stage))
            is_over = attempt(self._host.events.on_failure_of(name), stage, turn) is not False
            is_timed_out = is_late and len(self.pending) > 1 and stage == self.time_step
            if not is_over and not is_timed_out:
                return
            self.pending.pop(0)

    def close_profiler(self) -> None:
        """Stop torch's profiler, if it runs: it must not outlive the interpreter."""
        if self._profiler is not None:
            self._profiler.close()

    def forget_profiler(self) -> None:
        """Leave the profiler to the parent, in the child of a fork."""
        self._profiler = None
