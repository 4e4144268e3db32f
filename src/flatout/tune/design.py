"""Builds factorial designs: combinations of settings in which every step tells about every setting.

An *arm* is a combination of settings that is applied for some steps. If each arm had one setting, a
step would tell about one setting. A *factor* is a set of settings that exclude each other. In a
factorial design, each factor is on in half of the arms and off in the other half. For any two
factors, each of the four on/off combinations occurs equally often. With 20 factors, a
factorial design needs about a tenth of the steps that one-setting arms would need for the same
precision (Plackett and Burman 1946, The design of optimum multifactorial experiments). For each
arm there is an opposite arm, in which exactly the other factors are on, so that two-factor
interactions do not bias main effects (Box and Wilson 1951: fold-over).
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
"""If a factor has several settings, its settings are assigned to arms at random. This many random
assignments are tried, and the best is used."""

_SINGULAR = 1e-9
"""A pivot whose absolute value is below this counts as zero: in a matrix of whole numbers, it is a
rounding error."""


def build_arms(factors: Sequence[Sequence[tuple[str, str]]]) -> tuple[dict[str, str], ...]:
    """Build the arms of a comparison; the first arm has no settings.

    Args:
        factors: a list of at most ``MAXIMUM_FACTORS`` factors. Each factor is a list of settings
            (knob, setting) that exclude each other.

    Returns 2n arms. The number n is the smallest of ``_ORDERS`` that exceeds the number of factors
    and with which all effects can be estimated.

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
    """Return for each arm of one half of the design which factors are on.

    The other half consists of the opposite arms.
    """
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
    """Turn the rows of ``_build_half`` into arms, each followed by its opposite.

    For each factor that is on in an arm, one of its settings is chosen. Each setting of a factor is
    chosen about equally often, in random order: in a fixed order, certain settings of two factors
    could always occur together.
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

    It is assumed that each arm gets the same number of steps. The larger the determinant, the
    smaller is the joint confidence region of the baseline's speed and all effects (D-optimality,
    Wald 1943). The result is minus infinity if some effects cannot be told apart.
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
