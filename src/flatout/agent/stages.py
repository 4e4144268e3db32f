"""Running the stages of a run, one after the other, at step boundaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from flatout.agent import ensemble
from flatout.intercept.containment import attempt
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.profile import Profiler
    from flatout.agent.usage import UsageLog
    from flatout.intercept.host import Host

Stage = Callable[[Turn], bool]
"""Called at each step boundary with the turn that has closed, until it returns true."""


class Stages:
    """The stages that a request asks for, in order: timing, a comparison inside the process or
    alternation with another process, and the profile.

    Args:
        host: the host of this process; its request decides which stages there are.
        stop: the last stage, which ends the process.
        usage: takes readings of CPU time.

    Attributes:
        pending: the stages that are not over; the first stage is running.
    """

    def __init__(self, host: Host, stop: Stage, usage: UsageLog) -> None:
        self._host = host
        self._stop = stop
        self._usage = usage
        self._profiler: Profiler | None = None
        self._steps_timed = 0
        self._timed_from_ns: int | None = None
        self.pending: list[Stage] = []

    def add_requested(self) -> None:
        """Add the stages that the request asks for. Some set the host's arm and mark at once."""
        host, request = self._host, self._host.request
        if request.comparison is not None:
            from flatout.agent.learning import Learner
            from flatout.agent.switch import Switch

            compares = Learner if request.learn else Switch
            self.pending.append(compares(host, request.comparison, self._usage).at_boundary)
        elif request.relay is not None:
            from flatout.agent.relay import Runner

            self.pending.append(Runner(host, request.relay, self._usage).at_boundary)
        elif request.stop_steps is not None or request.stop_seconds is not None:
            self.pending.append(self.time_step)
        if request.profile_steps:
            from flatout.agent.profile import Profiler

            self._profiler = Profiler(host, request.profile_steps)
            self.pending.append(self._profiler.at_boundary)
            if request.replay is not None:
                from flatout.agent.replay import Replayer

                profiler = self._profiler
                replayer = Replayer(host, request.replay, lambda: profiler.result)
                self.pending.append(replayer.at_boundary)
        if self.pending and not request.learn:
            self.pending.append(self._stop)

    def time_step(self, turn: Turn) -> bool:
        """Count a step; return whether all steps that the request asks for have been timed."""
        if self._host.counts_as_step(turn):
            self._steps_timed += 1
        limit = self._host.request.stop_steps
        return limit is not None and self._steps_timed >= limit

    def run(self, turn: Turn) -> None:
        """Run the first stage and, if it ends, the stages that begin at the same boundary.

        If a stage fails, it is over, and an event is added. The time limit of the request counts
        from the end of the first step, since start-up and first step may include compilation. The
        limit ends only ``time_step``.
        """
        on_failure = self._host.events.on_failure_of("time limit")
        is_late = attempt(on_failure, self._is_late, turn) is True
        while self.pending:
            stage = self.pending[0]
            name = getattr(stage, "__qualname__", repr(stage))
            is_over = attempt(self._host.events.on_failure_of(name), stage, turn) is not False
            is_timed_out = is_late and len(self.pending) > 1 and stage == self.time_step
            if not is_over and not is_timed_out:
                return
            self.pending.pop(0)

    def _is_late(self, turn: Turn) -> bool:
        """Return whether the time limit of the request has passed, for all processes of the job."""
        limit_s = self._host.request.stop_seconds
        if self._timed_from_ns is None:
            self._timed_from_ns = turn.end_ns
        is_timing = bool(self.pending) and self.pending[0] == self.time_step
        if limit_s is None or not is_timing or not self._host.counts_as_step(turn):
            return False
        is_late = (
            turn.end_ns - self._timed_from_ns > limit_s * 1e9
            and self._steps_timed + 1 >= self._host.request.least_steps
        )
        processes = ensemble.find(self._host.roots)
        if processes is None:
            return is_late
        return processes.is_last_step(self._steps_timed, is_late)

    def close_profiler(self) -> None:
        """Stop torch's profiler if it runs, because it must not outlive the interpreter."""
        if self._profiler is not None:
            self._profiler.close()

    def forget_profiler(self) -> None:
        """Drop the profiler in the child of a fork, because it belongs to the parent."""
        self._profiler = None
