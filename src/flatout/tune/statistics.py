"""What is concluded from step times: ratios, which settings win, when enough has been measured.

Pure functions of recorded steps, the same that ``benchmarks/replay.py`` puts to the test. Inside
one process, see ``flatout.ratios``; of fresh processes, each pair counts once, by the median over
its steps of the logarithm of bare's time over the plan's, and intervals are taken over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, median, stdev
from typing import TypeVar

from flatout.wire.ratios import CONFIDENCE, Block, Ratio, Size
from flatout.wire.record import Step
from flatout.wire.request import Comparison

MINIMUM_PAIRS = 5
"""Pairs of fresh processes below which nothing is claimed."""

PRECISE = 0.03
"""Half-width of a claimed interval (relative) at which more pairs are not worth their time.

With it, an independent measurement of half-width 4 % agrees to 5 %; and the interval of a gain of
5 % lies above 1 in nine of ten cases.
"""

WORTHWHILE = 1.02
"""Gains below this are not looked for."""

RANKING_CONFIDENCE = 0.8

RANKING_PAIRS, MOST_RANKING_PAIRS = 3, 5
"""Of fresh processes, where they only rank: if the first do not agree, up to the second."""

WILD, USUAL_SPREAD, MOST_WILD = 3.0, 0.05, 0.1
"""Standard deviations from which on the ratio of a step and its counterpart is wild, the least
deviation that is reckoned with, and the share of wild steps beyond which they are no accident."""

A = TypeVar("A")


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


def pair_log_ratio(bare_ms: Sequence[float], plan_ms: Sequence[float]) -> float:
    """Logarithm of bare's step time over the plan's, of one pair of runs; see ``paired_means_ms``.

    Raises:
        ValueError: there are no steps.
    """
    bare, plan = paired_means_ms(bare_ms, plan_ms)
    return math.log(bare / plan)


def paired_means_ms(bare_ms: Sequence[float], plan_ms: Sequence[float]) -> tuple[float, float]:
    """Mean step times of one pair of runs with the same seed.

    Both see the same data in the same order, so each step has its counterpart. What counts is the
    sum over all steps, as for the user; but a few steps whose ratio is far from that of the others
    (the machine stood still under one of the two) are left out with their counterparts.

    Args:
        bare_ms, plan_ms: times of their steps after the warm-up; what one made more than the other
            is left out.

    Raises:
        ValueError: there are no steps.
    """
    both = list(zip(bare_ms, plan_ms, strict=False))
    if not both:
        raise ValueError("a ratio needs a step of each run")
    logs = [math.log(bare / plan) for bare, plan in both]
    centre = median(logs)
    spread = median(abs(log - centre) for log in logs) / NormalDist().inv_cdf(0.75)
    limit = WILD * max(spread, USUAL_SPREAD)
    kept = [pair for pair, log in zip(both, logs, strict=True) if abs(log - centre) <= limit]
    if len(kept) < (1 - MOST_WILD) * len(both):
        kept = both
    return fmean(bare for bare, _ in kept), fmean(plan for _, plan in kept)


def enough_pairs(log_ratios: Sequence[float], most: int) -> bool:
    """Whether to stop measuring pairs of fresh processes.

    It stops when the interval is as narrow as ``PRECISE``, whatever it says: a rule that looks at
    the width alone leaves the interval's confidence as it is, in the limit (Chow and Robbins 1965,
    On the asymptotic theory of fixed-width sequential confidence intervals). It goes on, though, as
    long as a worthwhile gain is within the noise: without a gain that is rare, so it makes few
    claims more (``benchmarks/replay.py`` counts them). It also stops in vain: when the interval
    lies below 1, which can only make claims rarer.

    Args:
        log_ratios: so far, one for each pair.
        most: pairs that can be afforded, at least ``MINIMUM_PAIRS``.
    """
    if len(log_ratios) < MINIMUM_PAIRS:
        return False
    ratio = claimed(log_ratios)
    is_precise = math.sqrt(ratio.high / ratio.low) - 1 <= PRECISE
    is_open = ratio.low <= 1 and ratio.value >= WORTHWHILE
    return len(log_ratios) >= most or (is_precise and not is_open) or ratio.high < 1


def is_ranked(log_ratios: Sequence[float]) -> bool:
    """Whether a few pairs tell which of two is faster: they agree, or there are enough of them."""
    count = len(log_ratios)
    agree = sum(log > 0 for log in log_ratios) in (0, count)
    return count >= RANKING_PAIRS and (agree or count >= MOST_RANKING_PAIRS)


def is_mostly_faster(log_ratios: Sequence[float]) -> bool:
    """Whether the second of two was faster in most pairs. A process may be slow for its whole
    life (where its memory lies, what else runs), so the mean of few pairs is no measure."""
    return median(log_ratios) > 0


def is_gain(ratio: Ratio) -> bool:
    """Whether a gain is claimed."""
    return ratio.low > 1


def winners(ratios: Mapping[A, Ratio]) -> list[A]:
    """What goes into the stack, the greatest gain first: all that is likely to be faster.

    The lower end of the 80 % interval decides: one in ten settings of no effect wins by chance.
    They cost the stack nothing, and the claim, from fresh processes, does not rest on them; a real
    gain that is missed is lost.
    """
    share = NormalDist().inv_cdf((1 + RANKING_CONFIDENCE) / 2) / NormalDist().inv_cdf(
        (1 + CONFIDENCE) / 2
    )
    faster = [
        one
        for one, ratio in ratios.items()
        if math.log(ratio.value) > share * math.log(ratio.value / ratio.low)
    ]
    return sorted(faster, key=lambda one: ratios[one].value, reverse=True)


def redundant(without: Mapping[A, Ratio]) -> list[A]:
    """What the stack does not need, in the order in which to leave it out.

    Args:
        without: for each part of the stack, the ratio of the whole stack (the baseline) to the
            stack without that part, above 1 where it is faster without.

    Returns the parts without which the stack is, beyond noise, no more than ``WORTHWHILE`` slower.
    """
    spare = [one for one, ratio in without.items() if ratio.low > 1 / WORTHWHILE]
    return sorted(spare, key=lambda one: without[one].value, reverse=True)


# From steps to blocks


def blocks(steps: Sequence[Step], discard_steps: int) -> list[Block]:
    """The blocks of a comparison, in order.

    Args:
        steps: of one process, in order.
        discard_steps: the comparison's; at least 1, since its marks tell the blocks apart.
    """
    found: list[Block] = []
    marked = discard_steps
    for step in steps:
        if step.arm is None:
            continue
        same = bool(found) and found[-1].arm == step.arm
        if step.mark == "first":
            if not same or not found[-1].first_ms:
                found.append(Block(step.arm))
            found[-1].first_ms.append(step.step_ms)
        elif step.mark == "switched":
            if not same or found[-1].first_ms or marked == discard_steps:
                found.append(Block(step.arm))
                marked = 0
            marked += 1
        elif step.mark is None and same:
            found[-1].add(step.step_ms, Size.of(step))
    return found


def complete_blocks(steps: Sequence[Step], comparison: Comparison) -> list[Block]:
    """The blocks of a comparison that have all their timed steps, in order.

    Args:
        steps: of one process, in order.
        comparison: that it was asked for; its marks tell the blocks apart, so it discards steps.
    """
    timed_steps = comparison.block_steps - comparison.discard_steps
    found = blocks(steps, comparison.discard_steps)
    return [block for block in found if len(block.times_ms) >= timed_steps]


def typical_step_ms(steps: Sequence[Step], warmup_steps: int) -> float:
    """Median step time after the warm-up, in ms.

    Raises:
        ValueError: there are no steps after the warm-up.
    """
    times_ms = [step.step_ms for step in steps[warmup_steps:] if step.mark is None]
    if not times_ms:
        raise ValueError(f"{len(steps)} steps leave none after a warm-up of {warmup_steps}")
    return median(times_ms)
