"""The factorial design: combinations of settings in which every step tells about every setting.

If each arm had one setting, a step would tell about one setting. In a factorial design each setting
is on in half of the arms and off in the other half, in every combination with the others, so that
with 20 settings a gain is known from a tenth of the steps (Plackett and Burman 1946, The design of
optimum multifactorial experiments). Each arm is accompanied by its opposite, so that what two
settings do only together does not look like the effect of a third (Box and Wilson 1951: fold-over).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

_ORDERS = (4, 8, 12, 20, 24, 32, 44, 48)
"""Sizes of Hadamard matrices by Paley's construction: one more than a prime that is 3 modulo 4."""

MAXIMUM_FACTORS = _ORDERS[-1] - 1
"""Most factors of a design."""

_ATTEMPTS = 32
"""Number of random assignments that are tried where factors have several settings; the best is
taken."""

_SINGULAR = 1e-9
"""A pivot below this, in a matrix of whole numbers, is rounding."""


def build_stacks(factors: Sequence[Sequence[tuple[str, str]]]) -> tuple[dict[str, str], ...]:
    """Build the arms of a comparison; the first is empty.

    Args:
        factors: settings (knob, setting) that exclude each other, as those of one knob and those of
            knobs that claim the same; at most ``MAXIMUM_FACTORS``.

    Returns twice as many arms as the rows of the smallest Hadamard matrix that is larger than the
    number of factors; more arms where those could not tell all settings apart.

    Raises:
        ValueError: too many factors.
    """
    for order in _ORDERS:
        if order > len(factors):
            rows = _build_half(order)
            attempts = _ATTEMPTS if any(len(options) > 1 for options in factors) else 1
            designs = [_assign(rows, factors, random.Random(seed)) for seed in range(attempts)]
            best = max(designs, key=_log_determinant)
            if _log_determinant(best) > -math.inf:
                return best
    raise ValueError(f"{len(factors)} factors, at most {MAXIMUM_FACTORS}")


def _build_half(order: int) -> list[list[bool]]:
    """Which factors are on in each arm of one half; the other half has the opposite arms."""
    prime = order - 1
    squares = {number * number % prime for number in range(1, prime)}
    return [[False] * prime] + [
        [(column - row) % prime in squares or column == row for column in range(prime)]
        for row in range(prime)
    ]


def _assign(
    rows: Sequence[Sequence[bool]],
    factors: Sequence[Sequence[tuple[str, str]]],
    generator: random.Random,
) -> tuple[dict[str, str], ...]:
    """Assign to each factor that is on in an arm one of its settings, each equally often.

    The assignment is random: in a fixed order, settings of two factors could always go together.
    """
    hands = []
    for options in factors:
        hand = [options[number % len(options)] for number in range(len(rows))]
        generator.shuffle(hand)
        hands.append(hand)
    return tuple(
        dict(hand.pop() for number, hand in enumerate(hands) if row[number] != opposite)
        for row in rows
        for opposite in (False, True)
    )


def _log_determinant(arms: Sequence[Mapping[str, str]]) -> float:
    """The log determinant of the information matrix of equally many steps of each arm.

    The larger it is, the smaller is the region in which the baseline's speed and all effects are
    known to lie (D-optimality, Wald 1943). It is minus infinity if some effects cannot be told
    apart.
    """
    settings = sorted({item for arm in arms for item in arm.items()})
    rows = [[1.0, *(float(arm.get(knob) == s) for knob, s in settings)] for arm in arms]
    columns = list(zip(*rows, strict=True))
    matrix = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in columns] for a in columns]
    total = 0.0
    for place in range(len(matrix)):
        largest = max(range(place, len(matrix)), key=lambda row: abs(matrix[row][place]))
        matrix[place], matrix[largest] = matrix[largest], matrix[place]
        pivot = matrix[place][place]
        if abs(pivot) < _SINGULAR:
            return -math.inf
        total += math.log(abs(pivot))
        for row in matrix[place + 1 :]:
            factor = row[place] / pivot
            for column in range(place, len(matrix)):
                row[column] -= factor * matrix[place][column]
    return total
