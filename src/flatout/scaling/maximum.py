"""How much longer the slowest of several ranks takes than the mean: order statistics.

The largest of ``n`` independent times with the distribution function ``F`` has the distribution
function ``F ** n`` (David and Nagaraja, Order Statistics, 3rd edition, 2003, section 2.1). Up to a
high quantile, ``F`` is that of the measured times. Beyond it, where a few measurements say little
about thousands of ranks, the excess is taken as exponential (peaks over a threshold: Pickands,
"Statistical inference using extreme order statistics", Annals of Statistics 3, 1975, with shape 0).
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

TAIL_SHARE = 0.1
LEAST_TAIL = 8
"""The tail begins at this upper share of the measurements, or where there are this many: so the
mean excess has a relative standard error of at most 35 %."""

LEAST_MEASUREMENTS = 2 * LEAST_TAIL


def expected_maximum(measured: Array, ranks: Array) -> Array:
    """Return the expected largest of several independent times.

    Args:
        measured: at least ``LEAST_MEASUREMENTS`` times, in any unit.
        ranks: numbers of times.

    Returns:
        The expectation for each number, in the same unit. For one it is the mean.
    """
    ordered = np.sort(measured)
    body, exceeds, harmonic = _weights(len(ordered), tuple(int(n) for n in ranks))
    inside = body.shape[1]
    threshold = ordered[inside - 1]
    excess = float(np.mean(ordered[inside:] - threshold))
    found: Array = body @ ordered[:inside] + exceeds * threshold + harmonic * excess
    return found


@functools.lru_cache(maxsize=8)
def _weights(measurements: int, ranks: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return what the expectations are made of, for each number of ranks.

    Returns:
        The probability that the largest is this one, for each of the ordered measurements below the
        tail; the probability that it is in the tail; and the expected number of mean excesses above
        the threshold. If ``k`` times are in the tail, the largest of them exceeds it by the
        harmonic number of ``k`` (Rényi 1953), whose mean for a binomial ``k`` of ``n`` trials is
        the sum of ``(1 - p ** j) / j`` for ``j`` from 1 to ``n``.
    """
    tail = max(LEAST_TAIL, round(TAIL_SHARE * measurements))
    inside = measurements - tail
    below = inside / measurements
    number = np.array(ranks, dtype=np.float64)[:, None]
    cumulated = (np.arange(inside + 1) / measurements) ** number
    terms = np.arange(1, max(ranks) + 1)
    sums = np.cumsum((1 - below**terms) / terms)
    return (
        np.diff(cumulated, axis=1),
        1 - below ** number[:, 0],
        sums[np.array(ranks) - 1],
    )
