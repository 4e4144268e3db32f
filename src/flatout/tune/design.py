"""Builds factorial designs: combinations of settings in which every step tells about every setting.

An *arm* is a combination of settings that is applied for some steps. If each arm had one setting, a
step would tell about one setting. In a factorial design each factor (settings that exclude each
other) is on in half of the arms and off in the other half, and every combination of two factors
occurs equally often. With 20 factors, the same precision then takes about a tenth of the steps that
one-setting arms would need (Plackett and Burman 1946, The design of optimum multifactorial
experiments). Each arm is accompanied by its opposite, so that two-factor interactions do not bias
main effects (Box and Wilson 1951: fold-over).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

_ORDERS = (4, 8, 12, 20, 24, 32, 44, 48)
"""Orders of Hadamard matrices by Paley's construction: one more than a prime that is 3 modulo 4."""

MAXIMUM_FACTORS = _ORDERS[-1] - 1
"""Maximum number of factors of a design."""

_ATTEMPTS = 32
"""Number of random assignments that are tried if factors have several settings; the best is
used."""

_SINGULAR = 1e-9
"""A pivot below this counts as zero: in a matrix of whole numbers, it is a rounding error."""


def build_arms(factors: Sequence[Sequence[tuple[str, str]]]) -> tuple[dict[str, str], ...]:
    """Build the arms of a comparison; the first is empty.

    Args:
        factors: a list of at most ``MAXIMUM_FACTORS`` factors. Each factor is the list of the
            settings (knob, setting) that exclude each other.

    Returns 2n arms. The number n is the smallest of ``_ORDERS`` above the number of factors, or the
    next one with which all effects can be estimated.

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
    """Return the factors that are on, for each arm of one half; the other half is the opposite."""
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
    """Choose a setting for each factor that is on in an arm, each setting about equally often.

    The assignment is random: in a fixed order, settings of two factors could always go together.
    """
    settings_left = []
    for options in factors:
        settings = [options[number % len(options)] for number in range(len(rows))]
        generator.shuffle(settings)
        settings_left.append(settings)
    return tuple(
        dict(
            settings.pop()
            for number, settings in enumerate(settings_left)
            if row[number] != opposite
        )
        for row in rows
        for opposite in (False, True)
    )


def _log_determinant(arms: Sequence[Mapping[str, str]]) -> float:
    """Return the log determinant of the design's information matrix.

    Each arm gets the same number of steps. The larger the determinant, the smaller is the region in
    which the baseline's speed and all effects are known to lie (D-optimality, Wald 1943). The
    result is minus infinity if some effects cannot be told apart.
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
