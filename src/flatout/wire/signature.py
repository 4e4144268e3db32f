"""The signature of a program's inputs: one word for each tensor of the first outermost module call.

The word of a tensor is ``dtype[size,size]``, such as ``float32[64,3,32,32]``; in a plan, ``*``
stands for a size that differed between the runs of the proof. This file imports only the
standard library, because both halves load it.
"""

from __future__ import annotations

from collections.abc import Sequence

VARYING = "*"


def matches(proven: Sequence[str], seen: Sequence[str]) -> bool:
    """Whether the inputs of a run match those of the proof."""
    return len(proven) == len(seen) and all(map(_matches, proven, seen))


def merge(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...] | None:
    """Return the words that match both signatures; ``None`` if they differ in more than sizes."""
    if len(one) != len(other):
        return None
    words = []
    for a, b in zip(one, other, strict=True):
        (dtype, sizes), (other_dtype, other_sizes) = _parts(a), _parts(b)
        if dtype != other_dtype or len(sizes) != len(other_sizes):
            return None
        kept = (x if x == y else VARYING for x, y in zip(sizes, other_sizes, strict=True))
        words.append(f"{dtype}[{','.join(kept)}]")
    return tuple(words)


def sizes(word: str) -> list[int | None]:
    """Return the sizes of a tensor; ``None`` for one that varies, and none for a scalar."""
    return [int(size) if size.isdecimal() else None for size in _parts(word)[1] if size]


def _matches(proven: str, seen: str) -> bool:
    both = merge((proven,), (seen,))
    return both == (proven,)


def _parts(word: str) -> tuple[str, list[str]]:
    dtype, _, sizes = word.rstrip("]").partition("[")
    return dtype, sizes.split(",")
