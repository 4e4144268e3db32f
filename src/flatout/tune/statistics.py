"""What step times show: ratios, which settings win, and when enough has been measured.

The functions are pure, and ``benchmarks/replay.py`` tests the same functions on recorded steps.
``wire/ratios.py`` estimates ratios inside one process. In fresh processes each pair counts once, by
the logarithm of its ratio, and intervals are taken over pairs. Claims rest on ``Pairs.log_ratios``,
which adds evaluation passes to the step times that ``paired_means_ms`` gives.

An arm is a combination of settings that a comparison inside one process switches to; a stack is the
settings that have been chosen so far, applied together.
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
"""Fewest pairs of fresh processes behind a claim."""

PRECISE = 0.03
"""Relative half-width of a claimed interval below which more pairs are not worth their time.

An independent measurement with a half-width of 4 % then agrees to 5 % (``sqrt(3**2 + 4**2)``), and
the interval of a gain of 5 % lies above 1 in nine of ten cases.
"""

WORTHWHILE = 1.02
"""Smallest speedup that is looked for."""

RANKING_CONFIDENCE = 0.8
"""Confidence of the intervals by which settings are ranked; claims have ``CONFIDENCE``."""

RANKING_PAIRS = 3
"""Pairs of fresh processes that only rank, if they agree on which side is faster."""

MOST_RANKING_PAIRS = 5
"""Most pairs of fresh processes that only rank, if they do not agree."""

OUTLIER_DEVIATIONS = 3.0
"""The ratio of a step and its counterpart is an outlier beyond this many standard deviations."""

LEAST_SPREAD = 0.05
"""Smallest standard deviation of the logarithms of these ratios that is assumed."""

MOST_OUTLIERS = 0.1
"""If more than this share of the steps are outliers, they are no accident, and none is left out."""

A = TypeVar("A")


def estimate_ratio(log_ratios: Sequence[float]) -> Ratio:
    """Estimate the geometric mean of the ratios of independent pairs, with Student's t-interval.

    Args:
        log_ratios: natural logarithm of the ratio of each pair, at least two.

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
    """The logarithm of bare's step time over the plan's in one pair; see ``paired_means_ms``.

    Evaluation passes do not count, unlike in ``Pairs.log_ratios``.

    Raises:
        ValueError: there are no steps.
    """
    bare, plan = paired_means_ms(bare_ms, plan_ms)
    return math.log(bare / plan)


def paired_means_ms(bare_ms: Sequence[float], plan_ms: Sequence[float]) -> tuple[float, float]:
    """The mean step times of two runs with the same seed, in ms.

    Both runs see the same data in the same order, so each step has a counterpart. All steps count,
    as they do for the user, except a few outliers: where the ratio of a step and its counterpart is
    far from that of the others, the machine stood still under one of the two, and both are left
    out.

    Args:
        bare_ms, plan_ms: step times after the warm-up; additional steps of the longer run are
            ignored.

    Raises:
        ValueError: there are no steps.
    """
    both = list(zip(bare_ms, plan_ms, strict=False))
    if not both:
        raise ValueError("a ratio needs a step of each run")
    logs = [math.log(bare / plan) for bare, plan in both]
    centre = median(logs)
    spread = median(abs(log - centre) for log in logs) / NormalDist().inv_cdf(0.75)
    limit = OUTLIER_DEVIATIONS * max(spread, LEAST_SPREAD)
    kept = [pair for pair, log in zip(both, logs, strict=True) if abs(log - centre) <= limit]
    if len(kept) < (1 - MOST_OUTLIERS) * len(both):
        kept = both
    return fmean(bare for bare, _ in kept), fmean(plan for _, plan in kept)


def enough_pairs(log_ratios: Sequence[float], most: int) -> bool:
    """Whether to stop measuring pairs of fresh processes.

    Measuring stops when the interval is as narrow as ``PRECISE``, whatever it says: a rule that
    looks at the width alone keeps the interval's confidence, in the limit (Chow and Robbins 1965,
    On the asymptotic theory of fixed-width sequential confidence intervals). There are two
    exceptions. It goes on while a worthwhile gain is within the noise; without a real gain that is
    rare, so it adds few false claims (``benchmarks/replay.py`` counts them). And it stops when the
    interval lies below 1, which can only make claims rarer.

    Args:
        log_ratios: logarithm of the ratio of each pair so far.
        most: number of pairs that can be afforded, at least ``MINIMUM_PAIRS``.
    """
    if len(log_ratios) < MINIMUM_PAIRS:
        return False
    ratio = estimate_ratio(log_ratios)
    is_precise = math.sqrt(ratio.high / ratio.low) - 1 <= PRECISE
    is_open = ratio.low <= 1 and ratio.value >= WORTHWHILE
    return len(log_ratios) >= most or (is_precise and not is_open) or ratio.high < 1


def is_ranked(log_ratios: Sequence[float]) -> bool:
    """Whether a few pairs tell which side is faster: they agree, or there are enough of them."""
    count = len(log_ratios)
    agree = sum(log > 0 for log in log_ratios) in (0, count)
    return count >= RANKING_PAIRS and (agree or count >= MOST_RANKING_PAIRS)


def is_mostly_faster(log_ratios: Sequence[float]) -> bool:
    """Whether the variant was faster in most pairs.

    The mean of few pairs would not tell: a process may be slow for its whole life, because of
    where its memory lies or what else runs.
    """
    return median(log_ratios) > 0


def is_gain(ratio: Ratio) -> bool:
    """Whether a ratio is a gain beyond noise, which may be claimed."""
    return ratio.low > 1


def pick_winners(ratios: Mapping[A, Ratio]) -> list[A]:
    """Pick what is likely to be faster, the greatest gain first.

    The lower end of the 80 % interval decides, so that one in ten settings without effect wins by
    chance. Such a setting costs the stack nothing, and the claim, from fresh processes, does not
    rest on it; a real gain that is missed would be lost.
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


def find_redundant(stack_less_part: Mapping[A, Ratio]) -> list[A]:
    """Find the parts of the stack that it does not need, in the order in which to leave them out.

    Args:
        stack_less_part: for each part, how many times faster the stack is without that part.

    Returns the parts whose removal surely slows the stack by less than 2 % (``WORTHWHILE``).
    """
    spare = [one for one, ratio in stack_less_part.items() if ratio.low > 1 / WORTHWHILE]
    return sorted(spare, key=lambda one: stack_less_part[one].value, reverse=True)


# From steps to blocks


def split_into_blocks(steps: Sequence[Step], discard_steps: int) -> list[Block]:
    """Split the steps of a comparison into its blocks, in order.

    Args:
        steps: steps of one process, in order.
        discard_steps: ``Comparison.discard_steps``, at least 1: the marks of discarded steps tell
            the blocks apart.
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
        steps: steps of one process, in order.
        comparison: the comparison that the process was asked for; it must discard steps, see
            ``split_into_blocks``.
    """
    timed_steps = comparison.block_steps - comparison.discard_steps
    found = split_into_blocks(steps, comparison.discard_steps)
    return [block for block in found if len(block.times_ms) >= timed_steps]


def typical_step_ms(steps: Sequence[Step], warmup_steps: int) -> float:
    """The median step time after the warm-up, in ms.

    Raises:
        ValueError: there are no steps after the warm-up.
    """
    times_ms = [step.step_ms for step in steps[warmup_steps:] if step.mark is None]
    if not times_ms:
        raise ValueError(f"{len(steps)} steps leave none after a warm-up of {warmup_steps}")
    return median(times_ms)
