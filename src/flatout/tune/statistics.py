"""Ratios of step times with their confidence intervals. Pure functions of recorded steps.

Step times are skewed and drift: the machine's speed changes by 2x within minutes. So nothing here
compares two means. Each block of steps counts once, by its median; arms are compared within pairs
of rounds, whose mirrored order cancels a steady drift (see ``agent/switch.py``); and intervals are
taken over the logarithms of these ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement, pairwise
from statistics import fmean, median, stdev

from flatout.record import Step

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """A speed-up: bare step time over the other's.

    Attributes:
        value: the estimate.
        low, high: confidence interval of it.
        pairs: number of pairs behind it.
    """

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"


def claimed(log_ratios: Sequence[float]) -> Ratio:
    """Geometric mean of ratios from independent pairs, with Student's t-interval.

    Args:
        log_ratios: natural logarithms, one for each pair, at least two.

    Raises:
        ValueError: fewer than two pairs.
    """
    from scipy import stats  # type: ignore[import-untyped]

    count = len(log_ratios)
    if count < 2:
        raise ValueError("an interval needs at least two pairs")
    centre = fmean(log_ratios)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half = quantile * stdev(log_ratios) / math.sqrt(count)
    return Ratio(math.exp(centre), math.exp(centre - half), math.exp(centre + half), count)


def in_sequence(log_ratios: Sequence[float]) -> Ratio:
    """Ratio of pairs that follow each other closely in one process, a few of which may be wild.

    From six pairs on: the Hodges-Lehmann estimate (median of the means of all two) with the
    interval that inverts Wilcoxon's signed-rank test (Hodges and Lehmann 1963), which from twelve
    pairs on bears one in which the machine stood still; with fewer pairs as ``claimed``. The
    interval grows by ``sqrt((1 + r) / (1 - r))``, with r the lag-1 autocorrelation where that is
    positive: the effective sample size of a first-order autoregression (Bartlett 1946).

    Args:
        log_ratios: natural logarithms in the order of time, at least two.

    Raises:
        ValueError: fewer than two pairs.
    """
    count = len(log_ratios)
    rank = _critical_rank(count)
    if rank is None:
        simple = claimed(log_ratios)
        centre, low, high = (math.log(x) for x in (simple.value, simple.low, simple.high))
    else:
        means = sorted((a + b) / 2 for a, b in combinations_with_replacement(log_ratios, 2))
        centre, low, high = median(means), means[rank], means[-1 - rank]
    correlation = min(max(_lag_1(log_ratios), 0.0), 0.9)
    wider = math.sqrt((1 + correlation) / (1 - correlation))
    return Ratio(
        math.exp(centre),
        math.exp(centre - (centre - low) * wider),
        math.exp(centre + (high - centre) * wider),
        count,
    )


def _critical_rank(count: int) -> int | None:
    """Largest k with P(W <= k) <= 2.5 % for the signed-rank statistic W; ``None``: there is none.

    W is the sum of those of the ranks 1 ... count that get a plus, each with probability 1/2.
    """
    ways = [1]
    for rank in range(1, count + 1):
        longer = [*ways, *[0] * rank]
        for total, number in enumerate(ways):
            longer[total + rank] += number
        ways = longer
    below = [total / 2**count for total in accumulate(ways)]
    tail = (1 - CONFIDENCE) / 2
    return sum(probability <= tail for probability in below) - 1 if below[0] <= tail else None


def _lag_1(values: Sequence[float]) -> float:
    centre = fmean(values)
    deviations = [value - centre for value in values]
    power = sum(deviation**2 for deviation in deviations)
    return sum(one * other for one, other in pairwise(deviations)) / power if power else 0.0


def blocks(steps: Sequence[Step], discard_steps: int) -> list[tuple[int, list[float]]]:
    """The timed step times of each block of a comparison, in ms, with its arm, in order.

    Args:
        steps: of one process, in order.
        discard_steps: the comparison's; at least 1, since its marks tell the blocks apart.
    """
    found: list[tuple[int, list[float]]] = []
    marked = discard_steps
    for step in steps:
        if step.arm is None:
            continue
        if step.mark == "switched":
            if not found or found[-1][0] != step.arm or marked == discard_steps:
                found.append((step.arm, []))
                marked = 0
            marked += 1
        elif step.mark is None and found and found[-1][0] == step.arm:
            found[-1][1].append(step.step_ms)
    return found


def in_process_ratios(
    found: Sequence[tuple[int, Sequence[float]]], timed_steps: int
) -> Mapping[int, Ratio]:
    """The ratio of each arm to arm 0, inside one process.

    Args:
        found: the blocks, see ``blocks``, in the order of ``agent.switch.block_order``.
        timed_steps: timed steps of a complete block; others are left out, with their round.

    Returns an entry for each arm that had at least two complete pairs of rounds.
    """
    logs: dict[int, list[float]] = {}
    for arm, times_ms in found:
        complete = len(times_ms) >= timed_steps
        logs.setdefault(arm, []).append(math.log(median(times_ms)) if complete else math.nan)
    bare = logs.get(0, [])
    ratios = {}
    for arm, mine in logs.items():
        rounds = min(len(bare), len(mine)) // 2 * 2
        pairs = [(bare[n] + bare[n + 1] - mine[n] - mine[n + 1]) / 2 for n in range(0, rounds, 2)]
        pairs = [pair for pair in pairs if not math.isnan(pair)]
        if arm and len(pairs) >= 2:
            ratios[arm] = in_sequence(pairs)
    return ratios


def typical_step_ms(steps: Sequence[Step], warmup_steps: int) -> float:
    """Median step time after the warm-up, in ms.

    Raises:
        ValueError: there are no steps after the warm-up.
    """
    times_ms = [step.step_ms for step in steps[warmup_steps:] if step.mark is None]
    if not times_ms:
        raise ValueError(f"{len(steps)} steps leave none after a warm-up of {warmup_steps}")
    return median(times_ms)
