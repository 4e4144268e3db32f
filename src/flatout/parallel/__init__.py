"""One program on several ranks: processes that replicate it and share out its root calls."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flatout.intercept.identity import WeakIdentitySet
from flatout.parallel.place import Place
from flatout.wire.lines import Lap, SharedWork, WholeCalls

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.parallel.kinds import Refusal, Rule
    from flatout.parallel.team import Team


class Parallel:
    """The ranks, as the session of one process has them.

    Args:
        host: of this process.
        place: of this process among the ranks.
        finish: writes the rest of the record, with a reason.
        processors: those of all ranks together; ``None``: they are not given up, whatever they
            cost.
    """

    def __init__(
        self,
        host: Host,
        place: Place,
        finish: Callable[[str], None],
        processors: Sequence[int] | None,
    ) -> None:
        import torch

        from flatout.parallel import interior
        from flatout.parallel.averaging import Averaging, Leaves
        from flatout.parallel.ending import Ending, Interruption
        from flatout.parallel.sharing import Sharing

        self._host = host
        self._place = place
        self._processors = processors
        self._threads = torch.get_num_threads()
        self._ending = Ending(place, host.events, finish)
        self._interruption = Interruption() if place.rank == 0 else None
        self._stepped_optimizers: WeakIdentitySet[Any] = WeakIdentitySet()
        self._is_alone = False
        self._has_left_call = False
        leaves = Leaves()
        self._sharing = Sharing(
            host.events,
            leaves,
            self._form_team,
            _find_rule,
            lambda: (host.roots, self._take_stepped()),
        )
        self._team: Team | None = None
        self._averaging = Averaging(leaves, lambda: self._sharing.team, self._is_in_shard)
        self._undo = [
            interior.install(),
            host.forward_wrappers.append(self._forward, self._ending.failed),
            host.backward_wrappers.append(self._backward, self._ending.failed),
            host.before_optimizer_step.append(self._include, self._ending.failed),
            host.after_optimizer_step.append(self._stepped, self._ending.failed),
        ]
        host.hooks.root_search.keeps_watches = True

    def close(self) -> None:
        """Leave the other ranks, at the end of the process."""
        self._remove()
        if self._team is None:
            return
        self._record_work(self._team)
        if self._ending.is_stopping:
            return
        self._host.events.add("noticed", "ranks", self._summary())
        self._host.events.add("noticed", "ranks", self._team.balance.describe())
        self._ending.note_end()
        self._team.channel.close()
        self._team = None

    def dismiss(self) -> None:
        """Let the other ranks end: this process stops before the program does."""
        self._ending.note_alone("rank 0 was stopped")

    def forget(self) -> None:
        """Compute everything whole from now on: this is the child of a fork."""
        self._remove()
        if self._interruption is not None:
            self._interruption.forget()
        if self._team is not None:
            self._team.channel.forget()
            self._team = None

    def _remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []

    def _forward(
        self, call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a root call."""
        if self._is_alone or self._has_been_interrupted() or self._has_cost_too_much():
            return call(module, *args, **kwargs)
        with self._noting_interrupted_calls():
            return self._sharing(call, module, args, kwargs)

    def _backward(self, call: Callable[..., Any], outputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Make a backward call."""
        from flatout.parallel.crossing import reaches_shards

        if not (self._is_alone or (self._has_left_call and self._has_been_interrupted())):
            with self._noting_interrupted_calls():
                return self._averaging(call, outputs, *args, **kwargs)
        if reaches_shards(outputs):
            self._ending.stop(
                "rank 0 has gone on alone and then makes a backward call through what the ranks "
                "have computed together before, which --ranks does not support"
            )
        return call(outputs, *args, **kwargs)

    @contextlib.contextmanager
    def _noting_interrupted_calls(self) -> Iterator[None]:
        """A context around what ranks do together. The others still wait where it was left."""
        try:
            yield
        except KeyboardInterrupt:
            self._has_left_call = True
            raise

    def _has_been_interrupted(self) -> bool:
        """Whether this is rank 0 and a signal has interrupted the program. From then on it computes
        everything by itself, and the others end."""
        if self._interruption is None or self._is_nested() or not self._interruption.has_come():
            return False
        self._go_alone("the program was interrupted")
        return True

    def _has_cost_too_much(self) -> bool:
        """Whether this is rank 0 and it goes on alone because that is faster."""
        team = self._team
        if team is None or self._place.rank or self._processors is None or self._is_nested():
            return False
        if team.thread != threading.get_ident() or not team.balance.has_lost():
            return False
        if team.graphs.are_open():
            return False
        balance = team.balance
        self._go_alone(
            f"in {team.step} steps the ranks have cost {balance.cost_s:.1f} s and saved at most "
            f"{balance.saving_s:.1f} s"
        )
        return True

    def _is_nested(self) -> bool:
        return self._sharing.is_in_shard or self._averaging.is_active

    def _go_alone(self, why: str) -> None:
        """Compute everything by this process from now on, on all cores; the other ranks end."""
        from flatout.parallel import alone

        self._is_alone = True
        if self._team is not None:
            self._record_work(self._team)
            self._host.events.add("noticed", "ranks", self._summary())
            self._host.events.add("noticed", "ranks", f"rank 0 goes on alone: {why}")
            self._ending.note_alone(f"rank 0 goes on alone: {why}")
            self._team.channel.close()
            self._team = None
        if self._processors is not None:
            alone.take_processors(self._processors, self._threads)

    def _is_in_shard(self) -> bool:
        """Whether this thread computes a shard, or looks for a rule."""
        is_watched = self._team is not None and self._team.thread == threading.get_ident()
        return self._sharing.is_in_shard and is_watched

    def _form_team(self) -> Team:
        from flatout.parallel import joining, sameness
        from flatout.parallel.team import Team

        processes = _count_processes_of_program()
        if processes > 1:
            self._ending.stop(
                f"--ranks is for programs of one process, and this one trains in {processes} that "
                "share out its batches already: leave --ranks out"
            )
        channel = joining.join(self._place, self._ending)
        self._team = team = Team(channel, self._ending)
        messages = [json.loads(text) for text in channel.exchange(json.dumps(sys.argv).encode())]
        if any(message != messages[0] for message in messages):
            self._ending.stop(
                f"the ranks run different programs: {messages[0]} and {messages[-1]}; programs "
                "that train at the same time in one job are not supported"
            )
        sameness.agree_on_kernel(channel.exchange)
        return team

    def _include(self, optimizer: Any) -> None:
        if not self._is_alone:
            self._averaging.include(optimizer)

    def _take_stepped(self) -> list[Any]:
        """Return the optimizers that have stepped since the last time, in the order in which they
        did first."""
        found = list(self._stepped_optimizers)
        self._stepped_optimizers = WeakIdentitySet()
        return found

    def _stepped(self, optimizer: Any) -> None:
        from flatout.parallel.sharing import COMPARED_STEPS

        if self._team is not None:
            self._stepped_optimizers.add(optimizer)
            self._team.step += 1
            self._team.balance.end_lap()
            self._sharing.compares_state = self._team.step in COMPARED_STEPS

    def _record_work(self, team: Team) -> None:
        """Record what was shared out, and what the time was spent on."""
        whole = self._sharing.whole.items()
        started_s = self._host.record.started_ns / 1e9
        self._host.record.write(
            SharedWork(
                team.size,
                dict(self._sharing.shared),
                tuple(WholeCalls(module, why, count) for (module, why), count in whole),
                {phase.value: seconds for phase, seconds in team.balance.seconds.items()},
                tuple(_rounded(lap, started_s) for lap in team.balance.laps),
            )
        )

    def _summary(self) -> str:
        """Return how many calls were shared out, and how many were not."""
        shared, whole = self._sharing.shared, self._sharing.whole
        parts = [f"{count} calls of {name} were shared out" for name, count in shared.items()]
        if not shared:
            parts.append("nothing was shared out, each rank has computed everything")
        parts += [
            f"{count} calls of {name} were not: {why}" for (name, why), count in whole.items()
        ]
        return "; ".join(parts)


def _rounded(lap: Lap, started_s: float) -> Lap:
    """Return a lap as it is recorded: times in tenths of microseconds, from the header on."""
    moved = lap._replace(end_s=lap.end_s - started_s)
    return Lap._make(round(value, 7) for value in moved)


def _count_processes_of_program() -> int:
    """Return how many processes the program itself has made one of, 1 if it has not."""
    from torch import distributed

    launched = os.environ.get("WORLD_SIZE", "")  # torchrun and what starts programs as it does
    connected = 1
    if distributed.is_available() and distributed.is_initialized():
        connected = distributed.get_world_size()
    return max(connected, int(launched) if launched.isdecimal() else 1)


def install(
    host: Host,
    place: Place,
    finish: Callable[[str], None],
    processors: Sequence[int] | None = None,
) -> Parallel:
    """Share out the root calls of this process from now on.

    Args:
        host: of this process.
        place: of this process among the ranks.
        finish: writes the rest of the record, with a reason, when the ranks have parted.
        processors: those of all ranks together; ``None``: they are not given up, whatever they
            cost.
    """
    return Parallel(host, place, finish, processors)


def _find_rule(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int
) -> Rule | Refusal:
    from flatout.parallel import checking

    return checking.find_rule(module, args, kwargs, size)
