"""Describes what a tune is doing now, for its progress line."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """Something that a tune does for a while, such as comparing settings.

    Attributes:
        what: the activity in words; the progress line begins with these words.
        pair: the number of the pair of runs that is being made, counted from 1; ``None`` if the
            activity makes no pairs.
        pairs: the number of pairs that the activity will make; ``None`` if it is not known.
        may_exceed_pairs: whether the activity makes more than ``pairs`` pairs if the results are
            not clear by then.
        ends_s: the time at which the activity should be over, in seconds on the clock of
            ``Journal.spent_s``, which counts the time of the tune so far.
    """

    what: str
    pair: int | None
    pairs: int | None
    ends_s: float
    may_exceed_pairs: bool = False
