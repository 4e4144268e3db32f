"""Which stacks of settings to run so that every step tells something about every setting.

With one setting an arm, a step tells about one setting. In a factorial design half of the arms have
a setting on, and half of them off, in every combination with the others: with 20 settings, a gain
is known from a tenth of the steps (Plackett and Burman 1946, The design of optimum multifactorial
experiments). With each arm goes its opposite, so that what two settings do only together does not
show as the effect of a third (Box and Wilson 1951: fold-over).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

_ORDERS = (4, 8, 12, 20, 24, 32, 44, 48)
"""Sizes of Hadamard matrices by Paley's construction: one more than a prime 3 modulo 4."""

MAXIMUM_FACTORS = _ORDERS[-1] - 1


_ATTEMPTS = 32
"""Ways of dealing out the settings of factors that have several, of which the best is taken."""


def stacks(factors: Sequence[Sequence[tuple[str, str]]]) -> tuple[dict[str, str], ...]:
    """The arms of a comparison; the first is the empty one.

    Args:
        factors: of each, the settings (knob, setting) that exclude each other: those of one knob,
            and those of knobs that claim the same. At most ``MAXIMUM_FACTORS``.

    Returns twice as many arms as a Hadamard matrix that is larger than the number of factors has
    rows; more where those could not tell all settings from each other.

    Raises:
        ValueError: too many factors.
    """
    for order in _ORDERS:
        if order > len(factors):
            rows = _half(order)
            attempts = _ATTEMPTS if any(len(options) > 1 for options in factors) else 1
            dealt = [_dealt(rows, factors, random.Random(seed)) for seed in range(attempts)]
            best = max(dealt, key=_log_determinant)
            if _log_determinant(best) > -math.inf:
                return best
    raise ValueError(f"{len(factors)} factors, at most {MAXIMUM_FACTORS}")


def _half(order: int) -> list[list[bool]]:
    """Which factors are on in each arm of one half; in the other half the others are."""
    prime = order - 1
    squares = {number * number % prime for number in range(1, prime)}
    return [[False] * prime] + [
        [(column - row) % prime in squares or column == row for column in range(prime)]
        for row in range(prime)
    ]


def _dealt(
    rows: Sequence[Sequence[bool]],
    factors: Sequence[Sequence[tuple[str, str]]],
    generator: random.Random,
) -> tuple[dict[str, str], ...]:
    """The arms, where each factor that is on has one of its settings, each as often as the others.

    Dealt out in turn, the settings of two factors can go together always.
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
    """Of the information that as many steps of each arm give about level and settings; the larger,
    the smaller the region in which all of them are known to lie (D-optimality, Wald 1943).
    Minus infinity: some cannot be told apart."""
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


_SINGULAR = 1e-9
"""Below this, a pivot of a matrix of whole numbers is rounding."""
