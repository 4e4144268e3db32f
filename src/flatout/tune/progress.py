"""What a tune is doing now, for whoever waits for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """A phase of a tune.

    Attributes:
        what: what is being done, in words that begin a line.
        pair: which pair of runs is being made, counted from 1; ``None``: it makes no pairs.
        pairs: how many pairs it will make; ``None``: the results decide that.
        ends_s: when it should be over, on the clock of ``Trials.spent_s``.
    """

    what: str
    pair: int | None
    pairs: int | None
    ends_s: float
