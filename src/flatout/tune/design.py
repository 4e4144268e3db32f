"""Which stacks of settings to run so that every step tells something about every setting.

With one setting an arm, a step tells about one setting. In a factorial design half of the arms have
a setting on, and half of them off, in every combination with the others: with 20 settings, a gain
is known from a tenth of the steps (Plackett and Burman 1946, The design of optimum multifactorial
experiments). With each arm goes its opposite, so that what two settings do only together does not
show as the effect of a third (Box and Wilson 1951: fold-over).
"""

from __future__ import annotations

from collections.abc import Sequence

_ORDERS = (4, 8, 12, 20, 24, 32, 44, 48)
"""Sizes of Hadamard matrices by Paley's construction: one more than a prime 3 modulo 4."""

MAXIMUM_FACTORS = _ORDERS[-1] - 1


def stacks(factors: Sequence[Sequence[tuple[str, str]]]) -> tuple[dict[str, str], ...]:
    """The arms of a comparison; the first is the empty one.

    Args:
        factors: of each, the settings (knob, setting) that exclude each other: those of one knob,
            and those of knobs that claim the same. At most ``MAXIMUM_FACTORS``.

    Returns twice as many arms as a Hadamard matrix that is larger than the number of factors has
    rows.

    Raises:
        ValueError: too many factors.
    """
    order = next((order for order in _ORDERS if order > len(factors)), None)
    if order is None:
        raise ValueError(f"{len(factors)} factors, at most {MAXIMUM_FACTORS}")
    prime = order - 1
    squares = {number * number % prime for number in range(1, prime)}
    half = [[False] * prime] + [
        [(column - row) % prime in squares or column == row for column in range(prime)]
        for row in range(prime)
    ]
    arms: list[dict[str, str]] = []
    uses = [0] * len(factors)
    for row in half:
        for opposite in (False, True):
            arm = {}
            for number, options in enumerate(factors):
                if row[number] != opposite:
                    knob, setting = options[uses[number] % len(options)]
                    uses[number] += 1
                    arm[knob] = setting
            arms.append(arm)
    return tuple(arms)
