"""Whether the ranks cost more time than they can save."""

from __future__ import annotations

import collections
import contextlib
import enum
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from flatout.wire.lines import Lap

WINDOW_S = 0.5
"""Time in shards and for the ranks, after which the two are compared."""

LOST_WINDOWS = 3
"""Windows in a row that must be lost: once, another program may have had the cores."""


MOST_LAPS = 1024
"""Laps that are kept: a record of any run stays small, and a mean over more is no better."""


class Phase(enum.Enum):
    """What a rank spends time on.

    Attributes:
        PROGRAM: what it would do alone, too.
        TESTING: what may be shared out, at the first calls.
        SHARD: its part of what is shared out.
        WAITING: for the slowest rank.
        COMMUNICATION: what the ranks send each other.
        COMPARISON: everything else that it does because there are other ranks.
    """

    PROGRAM = "program"
    TESTING = "testing"
    SHARD = "shard"
    WAITING = "waiting"
    COMMUNICATION = "communication"
    COMPARISON = "comparison"


class Exchange(enum.Enum):
    """What is counted: the work that ranks share out, and what they send each other for it.

    The values are fields of ``Lap``.
    """

    CALL = "calls"
    ROW = "rows"
    BACKWARD = "backwards"
    MEETING = "meetings"
    GATHER = "gathers"
    GATHERED_BYTES = "gathered_bytes"
    SUM = "sums"
    SUMMED_BYTES = "summed_bytes"


class Balance:
    """The time of one rank by phases.

    Sharing a computation out saves at most what the other ranks compute meanwhile, which is as much
    as this rank does: ``size - 1`` times its own time in shards. It saves less where one process
    would use all cores.

    Args:
        size: number of ranks.
        clock: returns seconds.

    Attributes:
        is_measured: whether the time of the host is that of the work; it is not if an accelerator
            does the work meanwhile.
        seconds: by phase, so far.
        counts: of exchanges and their bytes, so far.
        laps: the last ones; their ends are readings of the clock.
    """

    def __init__(self, size: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.is_measured = True
        self.seconds = dict.fromkeys(Phase, 0.0)
        self.counts = dict.fromkeys(Exchange, 0)
        self.laps: collections.deque[Lap] = collections.deque(maxlen=MOST_LAPS)
        self._lap_number = 0
        self._seconds_before = dict(self.seconds)
        self._counts_before = dict(self.counts)
        self._size = size
        self._clock = clock
        self._phase = Phase.PROGRAM
        self._is_in_backward = False
        self._since_s = clock()
        self._window_cost_s = self._window_saving_s = 0.0
        self._lost_windows = 0

    @contextlib.contextmanager
    def spend(self, phase: Phase) -> Iterator[None]:
        """A context whose time is spent on a phase, but for contexts in it."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    @contextlib.contextmanager
    def spend_backward(self) -> Iterator[None]:
        """A context of a backward call, whose time is the program's outside of graphs of shards
        (see ``Graph``)."""
        with self.spend(Phase.PROGRAM):
            self._is_in_backward, before = True, self._is_in_backward
            try:
                yield
            finally:
                self._is_in_backward = before

    def turn_to(self, phase: Phase) -> None:
        """Spend the time of a backward call on this phase from now on."""
        if self._is_in_backward:
            self._switch(phase)

    @property
    def is_programs(self) -> bool:
        """Whether this rank now does what it would do alone."""
        return self._phase is Phase.PROGRAM

    @property
    def is_for_ranks(self) -> bool:
        """Whether no code of the program runs now, only what is done because there are ranks."""
        return self._phase in (Phase.WAITING, Phase.COMMUNICATION, Phase.COMPARISON)

    def count(self, exchange: Exchange, number: int = 1) -> None:
        """Note an exchange, or the number of its bytes."""
        self.counts[exchange] += number

    def end_lap(self) -> None:
        """Note what was done since the last lap."""
        self._switch(self._phase)
        if not self.is_measured:
            return
        values: dict[str, Any] = {
            f"{phase.value}_s": seconds - self._seconds_before[phase]
            for phase, seconds in self.seconds.items()
        }
        values |= {e.value: count - self._counts_before[e] for e, count in self.counts.items()}
        self.laps.append(Lap(self._lap_number, self._since_s, **values))
        self._lap_number += 1
        self._seconds_before, self._counts_before = dict(self.seconds), dict(self.counts)

    @property
    def cost_s(self) -> float:
        """Time that one process would not need."""
        costs = Phase.WAITING, Phase.COMMUNICATION, Phase.COMPARISON
        return sum(self.seconds[phase] for phase in costs)

    @property
    def saving_s(self) -> float:
        """The most that sharing out can have saved."""
        return (self._size - 1) * self.seconds[Phase.SHARD]

    def describe(self) -> str:
        """Return what the time was spent on, and what ranks can gain (Amdahl 1967)."""
        if not self.is_measured:
            return "what rank 0 has spent its time on was not measured, as it computes on a GPU"
        self._switch(self._phase)
        total_s = sum(self.seconds.values())
        alike_s, shard_s = self.seconds[Phase.PROGRAM], self.seconds[Phase.SHARD]
        bound = (alike_s + self._size * shard_s) / (alike_s + shard_s)
        shares = ", ".join(
            f"{self.seconds[phase] / total_s:.0%} {words}" for phase, words in _WORDS.items()
        )
        return (
            f"rank 0 has spent {shares}; {self._size} ranks are at most {bound:.2f} times as fast "
            "as one of them alone"
        )

    def has_lost(self) -> bool:
        """Whether the ranks have cost more than they can have saved, lately and altogether, as far
        as that is measured."""
        if not self.is_measured:
            return False
        cost_s = self.cost_s - self._window_cost_s
        saving_s = self.saving_s - self._window_saving_s
        if cost_s + saving_s / (self._size - 1) >= WINDOW_S:
            self._lost_windows = self._lost_windows + 1 if cost_s > saving_s else 0
            self._window_cost_s, self._window_saving_s = self.cost_s, self.saving_s
        return self._lost_windows >= LOST_WINDOWS and self.cost_s > self.saving_s

    def _switch(self, phase: Phase) -> Phase:
        before, now = self._phase, self._clock()
        self.seconds[before] += now - self._since_s
        self._phase, self._since_s = phase, now
        return before


_WORDS = {
    Phase.SHARD: "on its shards",
    Phase.PROGRAM: "on what every rank does alike",
    Phase.TESTING: "testing what may be shared out",
    Phase.WAITING: "waiting for other ranks",
    Phase.COMMUNICATION: "sending and receiving tensors",
    Phase.COMPARISON: "comparing inputs and states",
}


class Graph:
    """What the ranks have computed together, as long as a backward call may go through it.

    Args:
        balance: learns when a backward call is in the graph of a shard.

    Attributes:
        is_reached: whether the present backward call has gone through it.
    """

    __slots__ = ("__weakref__", "_balance", "is_reached")

    def __init__(self, balance: Balance) -> None:
        self._balance = balance
        self.is_reached = False

    def enter(self) -> None:
        """Note that the present backward call comes from what every rank computes alike."""
        self.is_reached = True
        self._balance.turn_to(Phase.SHARD)

    def leave(self) -> None:
        """Note that the present backward call goes on with what every rank computes alike."""
        self.is_reached = True
        self._balance.turn_to(Phase.PROGRAM)


class Graphs:
    """The graphs through which a backward call may still go.

    Args:
        balance: see ``Graph``.
    """

    def __init__(self, balance: Balance) -> None:
        self._balance = balance
        self._open: weakref.WeakSet[Graph] = weakref.WeakSet()

    def open(self) -> Graph:
        """Return a new graph, to be held by what a backward call goes through."""
        graph = Graph(self._balance)
        self._open.add(graph)
        return graph

    def close_reached(self, is_kept: bool) -> None:
        """Note that a backward call has ended.

        Args:
            is_kept: whether another one may go through the same graph.
        """
        for graph in [graph for graph in self._open if graph.is_reached]:
            graph.is_reached = False
            if not is_kept:
                self._open.discard(graph)

    def are_open(self) -> bool:
        """Whether a backward call may still go through what the ranks have computed together."""
        return bool(self._open)
