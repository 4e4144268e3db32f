"""The shard that is being computed, as the operators see it that must know of it: batch norm and
draws of random numbers."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import checkpoint

from flatout.intercept.patch import Undo, replace_function
from flatout.parallel.balance import Graph
from flatout.parallel.placement import Draw, Placement, Rows, UnshareableError

SumOverRanks = Callable[[list[torch.Tensor]], list[torch.Tensor]]
"""Returns the sums of tensors over all ranks, the same bits on each. It may write to the tensors.
All ranks call it in the same order, in the forward and in the backward pass."""


class Shard:
    """The shard that a root call computes.

    Args:
        rows: its samples.
        sum_over_ranks: adds up tensors of all ranks.
        placements: of the call's draws in their order (see ``placement.place``).
        sum_gradients: adds up gradients of all ranks; by default as ``sum_over_ranks`` does.
        sums: where the samples are in what operators add up, in their order; empty: operators add
            up what the shard has.
        sum_terms: adds up what operators have added up; by default as ``sum_over_ranks`` does.

    Attributes:
        terms: what was added up over samples and where they are in it, if that is kept; else
            ``None``.
        drawn: how often random numbers were drawn.
        is_busy: whether an operator is being computed whose own batch norms, draws and sums do not
            count.
        graph: of the call; ``None``: it is only tested.
    """

    def __init__(
        self,
        rows: Rows,
        sum_over_ranks: SumOverRanks,
        placements: Sequence[Placement] = (),
        sum_gradients: SumOverRanks | None = None,
        sums: Sequence[Placement] = (),
        sum_terms: SumOverRanks | None = None,
    ) -> None:
        self.rows = rows
        self.sum_over_ranks = sum_over_ranks
        self.sum_gradients = sum_gradients or sum_over_ranks
        self.sum_terms = sum_terms or sum_over_ranks
        self.placements = placements
        self.sums = sums
        self.terms: list[tuple[Placement, torch.Tensor]] | None = None
        self.is_busy = False
        self.graph: Graph | None = None
        self.drawn = 0
        self._summed = 0

    @property
    def leaves_sums(self) -> bool:
        """Whether operators add up what the shard has."""
        return not self.sums

    def next_placement(self, draw: Draw) -> Placement:
        """Return where the samples are in the next draw.

        Raises:
            UnshareableError: this is another draw than the one that was placed.
        """
        if self.drawn == len(self.placements):
            raise UnshareableError("draws more random numbers than the call that was tested")
        placement = self.placements[self.drawn]
        self.drawn += 1
        if not placement.fits(draw, self.rows):
            raise UnshareableError("draws other random numbers than the call that was tested")
        return placement

    def next_sum(self, operator: str, shape: Sequence[int]) -> bool:
        """Return whether the next sum is one over samples.

        Args:
            operator: that adds up.
            shape: of its terms.

        Raises:
            UnshareableError: this is another sum than the one that was placed.
        """
        if self._summed == len(self.sums):
            raise UnshareableError("adds up more than the call that was tested")
        placement = self.sums[self._summed]
        self._summed += 1
        if not placement.fits(Draw(operator, tuple(shape)), self.rows):
            raise UnshareableError("adds up something else than the call that was tested")
        return placement.dim is not None

    def note_terms(self, terms: torch.Tensor) -> None:
        """Keep what is added up, if it is to be compared."""
        if self.terms is not None:
            self.terms.append((self.sums[self._summed - 1], terms.detach().clone()))

    def finish(self) -> None:
        """Note that the call is over.

        Raises:
            UnshareableError: it should have drawn or added up more.
        """
        if self.drawn < len(self.placements):
            raise UnshareableError("draws fewer random numbers than the call that was tested")
        if self._summed < len(self.sums):
            raise UnshareableError("adds up less than the call that was tested")

    def copy(self) -> Shard:
        """Return the same shard at the same place in its draws and sums."""
        copied = copy.copy(self)
        copied.terms = None
        return copied


class Observer(Shard):
    """The whole batch as one shard, of which the draws and sums are recorded and left as they are.

    Args:
        sum_over_ranks, sum_gradients: as in ``Shard``.

    Attributes:
        draws: in their order.
        additions: what operators add up, in their order.
    """

    def __init__(self, sum_over_ranks: SumOverRanks, sum_gradients: SumOverRanks) -> None:
        super().__init__(Rows(0, 1, 1), sum_over_ranks, (), sum_gradients)
        self.draws: list[Draw] = []
        self.additions: list[Draw] = []

    @property
    def leaves_sums(self) -> bool:
        """Whether operators add up without being recorded."""
        return False

    def next_placement(self, draw: Draw) -> Placement:
        """Record a draw; it is made as it is."""
        self.draws.append(draw)
        self.drawn += 1
        return Placement(draw.operator, len(draw.shape), None)

    def next_sum(self, operator: str, shape: Sequence[int]) -> bool:
        """Record a sum; it is computed as it is."""
        self.additions.append(Draw(operator, tuple(shape)))
        return False

    def copy(self) -> Observer:
        """Return an observer for what is computed again, whose draws are known already."""
        return Observer(self.sum_over_ranks, self.sum_gradients)


class _Local(threading.local):
    current: Shard | None = None


class _Tested:
    """Whether a test makes a backward call; autograd may make parts of it in other threads."""

    is_in_backward = False


_local = _Local()


def current() -> Shard | None:
    """Return the shard that this thread computes; ``None`` if it computes none."""
    found = _local.current
    return None if found is None or found.is_busy else found


@contextlib.contextmanager
def shard(
    start: int,
    stop: int,
    batch: int,
    sum_over_ranks: SumOverRanks,
    placements: Sequence[Placement] = (),
    sum_gradients: SumOverRanks | None = None,
    sums: Sequence[Placement] = (),
    sum_terms: SumOverRanks | None = None,
    keeps_terms: bool = False,
) -> Iterator[Shard]:
    """A context around a call that computes a shard: batch norm, draws and sums are those of the
    whole batch.

    Args:
        start, stop: the first sample of the shard and the one after its last.
        batch: number of samples of the whole call.
        sum_over_ranks: adds up tensors of all ranks; it is called in the backward pass too.
        placements: of the draws of calls of this kind (see ``placement.place``).
        sum_gradients: adds up gradients of all ranks; by default as ``sum_over_ranks`` does.
        sums: likewise of what operators add up; empty: they add up what the shard has.
        sum_terms: adds up what operators have added up; by default as ``sum_over_ranks`` does.
        keeps_terms: whether what is added up over samples is kept.

    Raises:
        UnshareableError: the call draws other random numbers than those placed, adds up something
            else, or computes batch norm in a way that cannot be shared out.
    """
    state = Shard(
        Rows(start, stop, batch), sum_over_ranks, placements, sum_gradients, sums, sum_terms
    )
    if keeps_terms:
        state.terms = []
    UnshareableError.last_reason = ""
    with _entered(state):
        yield state
    if UnshareableError.last_reason:  # the program has caught it
        raise UnshareableError(UnshareableError.last_reason)
    state.finish()


@contextlib.contextmanager
def observing(
    sum_over_ranks: SumOverRanks = list, sum_gradients: SumOverRanks = list
) -> Iterator[Observer]:
    """A context around a whole call that records its draws and what it adds up.

    Args:
        sum_over_ranks, sum_gradients: get what shards would add up, and return what is to be used
            as the sum; by default, both are the same.
    """
    observer = Observer(sum_over_ranks, sum_gradients)
    with _entered(observer):
        yield observer


@contextlib.contextmanager
def tested_backward() -> Iterator[None]:
    """A context around the backward call of a test. A backward call inside of it is one of its
    parts, as that of a checkpoint."""
    _Tested.is_in_backward = True
    try:
        yield
    finally:
        _Tested.is_in_backward = False


def is_in_tested_backward() -> bool:
    """Whether a test makes a backward call now."""
    return _Tested.is_in_backward


@contextlib.contextmanager
def busy(state: Shard) -> Iterator[None]:
    """A context for an operator whose own batch norms and draws do not count."""
    state.is_busy = True
    try:
        yield
    finally:
        state.is_busy = False


@contextlib.contextmanager
def _entered(state: Shard) -> Iterator[None]:
    before, _local.current = _local.current, state
    try:
        yield
    finally:
        _local.current = before


def raise_failure(error: Exception) -> None:
    """Raise a failure of an override: it must not be computed for the shard alone instead."""
    raise error


def install_checkpoint() -> Undo:
    """Let ``torch.utils.checkpoint`` compute again what belongs to a shard as part of that shard,
    in the backward pass; returns the undo."""
    begin: Callable[..., None] = checkpoint._CheckpointFrame.__init__
    forward: Callable[..., Any] = checkpoint.CheckpointFunction.forward

    def begin_resumed(frame: Any, compute_again: Callable[..., Any], *args: Any) -> None:
        begin(frame, _resume(compute_again), *args)

    def run(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        resumed = _resume(function)
        result = forward(ctx, function, *args)
        ctx.run_function = resumed
        return result

    with contextlib.ExitStack() as undo:
        undo.callback(replace_function(checkpoint._CheckpointFrame, "__init__", begin_resumed))
        replacement: Any = staticmethod(run)
        undo.callback(replace_function(checkpoint.CheckpointFunction, "forward", replacement))
        return undo.pop_all().close


def _resume(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``function`` in the shard that is computed now, at the place in
    its draws where it is now."""
    now = current()
    if now is None:
        return function
    there = now.copy()

    def call(*args: Any, **kwargs: Any) -> Any:
        with _entered(there.copy()):
            return function(*args, **kwargs)

    return call
