"""Computes ratios from step times; decides which settings win, and when to stop measuring.

Ratios are estimated here from pairs of fresh processes, and in ``wire/ratios.py`` from steps inside
one process. Each pair counts once, by the logarithm of its ratio: the step time of one run divided
by that of the other (``Pairs.log_ratios``). The interval follows from the spread between pairs. The
step time of a run is the mean that ``paired_means_ms`` returns, plus the step's share of evaluation
passes and of late captures (``Pairs.times_ms``). A late capture is the work of a knob that captures
or compiles a part of the program late in the run.

A comparison inside one process switches between combinations of settings, the *arms*. A *block* is
consecutive steps of one arm. The *stack* is the settings that have been chosen so far, applied
together.

The functions are pure. ``benchmarks/replay.py`` tests them on recorded steps.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist, fmean, median, stdev
from typing import TypeVar

from flatout.wire.ratios import CONFIDENCE, Block, Ratio, Size, merge_steps, to_ratio
from flatout.wire.record import Step
from flatout.wire.request import Comparison

MINIMUM_PAIRS = 5
"""Minimum number of pairs of fresh processes behind a claim. If the user interrupts the tune, two
pairs are enough; their interval is wide."""

FEWEST_PAIRS = 3
"""Minimum number of pairs if the budget has no time for ``MINIMUM_PAIRS``. Student's t-interval
over so few pairs is wide, so only a clear gain is claimed."""

PRECISE = 0.03
"""Relative half-width of a claimed interval below which more pairs are not worth their time.

If the gain is 5 %, then in nine of ten cases an interval of this width excludes a ratio of 1.
"""

WORTHWHILE = 1.02
"""Smallest speedup that a tune tries to find."""

RANKING_CONFIDENCE = 0.8
"""Confidence of the intervals by which settings are ranked. Claims are made with
``CONFIDENCE``."""

RANKING_PAIRS = 3
"""Number of pairs of fresh processes after which a candidate is ranked, if all of them agree on
which side is faster."""

MAXIMUM_RANKING_PAIRS = 5
"""Number of pairs of fresh processes after which a candidate is ranked even if they disagree."""

OUTLIER_DEVIATIONS = 3.0
"""In a pair of runs, each step has a ratio: its time in one run divided by its time in the other. A
step is an outlier if the logarithm of its ratio is more than this many standard deviations from the
median of these logarithms. Outliers are left out."""

LEAST_SPREAD = 0.05
"""Lower bound on the standard deviation of these logarithms."""

MAXIMUM_OUTLIERS = 0.1
"""If more than this share of the steps are outliers, they are no accident, and none is left out."""

A = TypeVar("A")


def estimate_ratio(log_ratios: Sequence[float]) -> Ratio:
    """Estimate the geometric mean of the ratios of independent pairs, with Student's t-interval.

    Args:
        log_ratios: the natural logarithms of the ratios of the pairs, at least two.

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
    return to_ratio(centre, half, count)


def estimate_weighted_ratio(log_ratios: Sequence[float], weights: Sequence[float]) -> Ratio:
    """Estimate the weighted geometric mean of ratios, with Student's t-interval.

    The interval is that of equally weighted ratios whose number is Kish's effective sample size,
    (sum w)^2 / sum w^2 (Kish 1965, Survey Sampling).

    Args:
        log_ratios: the natural logarithms of the ratios, at least two.
        weights: their weights.
    """
    from scipy import stats

    total = math.fsum(weights)
    centre = math.fsum(w * log for w, log in zip(weights, log_ratios, strict=True)) / total
    size = max(total**2 / math.fsum(w**2 for w in weights), 1.5)
    spread = (
        math.fsum(w * (log - centre) ** 2 for w, log in zip(weights, log_ratios, strict=True))
        / total
    )
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, size - 1))
    half = quantile * math.sqrt(spread / (size - 1))
    return to_ratio(centre, half, len(log_ratios))


def paired_means_ms(
    pairs_ms: Sequence[Sequence[tuple[float, float] | None]],
) -> list[tuple[float, float]]:
    """Return the mean step times of the two runs of each pair, in ms.

    The two runs of a pair have the same seed, so each step has a counterpart in the other run. The
    counterpart sees the same data, unless a setting changes the order of the data. All steps count,
    because the user waits for all of them. Only a few outliers are left out: if the ratio of a step
    to its counterpart is far from the ratios of the other steps, the machine is assumed to have
    paused during one of the two, and both are left out. But if the same step is an outlier in most
    pairs, it does something that the other steps do not, such as saving the model. It then counts.

    Args:
        pairs_ms: for each pair, the times of the steps after the warm-up and of their counterparts,
            in ms; ``None`` for a step that was disturbed and does not count.

    Raises:
        ValueError: a pair has no steps.
    """
    outliers = [_find_outliers(steps) for steps in pairs_ms]
    seen = Counter(number for of_pair in outliers for number in of_pair)
    recurring = {number for number, count in seen.items() if 1 < count > len(pairs_ms) / 2}
    means = []
    for steps, of_pair in zip(pairs_ms, outliers, strict=True):
        left_out = of_pair - recurring
        kept = [both for number, both in enumerate(steps) if both and number not in left_out]
        means.append((fmean(one for one, _ in kept), fmean(other for _, other in kept)))
    return means


def _find_outliers(steps: Sequence[tuple[float, float] | None]) -> set[int]:
    """Return the numbers of the steps of a pair of runs that seem to be outliers.

    Raises:
        ValueError: there are no steps.
    """
    logs = {number: math.log(both[0] / both[1]) for number, both in enumerate(steps) if both}
    if not logs:
        raise ValueError("a ratio needs a step of each run")
    centre = median(logs.values())
    spread = median(abs(log - centre) for log in logs.values()) / NormalDist().inv_cdf(0.75)
    limit = OUTLIER_DEVIATIONS * max(spread, LEAST_SPREAD)
    found = {number for number, log in logs.items() if abs(log - centre) > limit}
    return found if len(found) <= MAXIMUM_OUTLIERS * len(logs) else set()


def has_enough_pairs(log_ratios: Sequence[float], maximum: int) -> bool:
    """Return whether to stop measuring pairs of fresh processes.

    Measuring stops when the interval is as narrow as ``PRECISE``, wherever it lies. Under a rule
    that looks only at the width, the interval keeps its confidence asymptotically (Chow and Robbins
    1965, On the asymptotic theory of fixed-width sequential confidence intervals). There are two
    exceptions:

    - If the estimate is at least ``WORTHWHILE`` but the interval includes 1, measuring continues.
      The estimate of a setting without a gain is rarely that high, so this adds few false claims
      (``benchmarks/replay.py`` counts them).
    - If the whole interval lies below 1, measuring stops. This can only make claims rarer.

    Args:
        log_ratios: the logarithms of the ratios of the pairs so far.
        maximum: the number of pairs that can be afforded, at least ``MINIMUM_PAIRS``.
    """
    if len(log_ratios) < MINIMUM_PAIRS:
        return False
    ratio = estimate_ratio(log_ratios)
    is_precise = math.sqrt(ratio.high / ratio.low) - 1 <= PRECISE
    is_open = ratio.low <= 1 and ratio.value >= WORTHWHILE
    return len(log_ratios) >= maximum or (is_precise and not is_open) or ratio.high < 1


def is_ranked(log_ratios: Sequence[float]) -> bool:
    """Return whether a few pairs suffice to tell which side is faster.

    ``RANKING_PAIRS`` pairs suffice if all of them agree; otherwise ``MAXIMUM_RANKING_PAIRS`` pairs
    suffice.
    """
    count = len(log_ratios)
    agree = sum(log > 0 for log in log_ratios) in (0, count)
    return count >= RANKING_PAIRS and (agree or count >= MAXIMUM_RANKING_PAIRS)


def is_probably_faster(log_ratios: Sequence[float]) -> bool:
    """Return whether a few pairs show that the variant is probably faster.

    One of two things suffices: the mean shows a gain (``pick_winners``), or the variant is faster
    in at least four fifths of the pairs. The mean alone would not do: it tells little if one
    process was slow for its whole life, because of where its memory lies or of other processes.

    Of settings without effect, 12 % are faster in all of three pairs, and 19 % in at least four of
    five pairs.
    """
    is_winner = bool(pick_winners({"variant": estimate_ratio(log_ratios)}))
    return is_winner or sum(log <= 0 for log in log_ratios) <= len(log_ratios) // 5


def is_gain(ratio: Ratio) -> bool:
    """Return whether a ratio is a gain beyond noise. Only such a gain may be claimed."""
    return ratio.low > 1


def pick_winners(ratios: Mapping[A, Ratio]) -> list[A]:
    """Pick the settings that are likely to be faster, the greatest gain first.

    A setting wins if its 80 % interval lies above 1. So one in ten settings without effect wins by
    chance. Such a setting does not slow the stack down, and it does not affect the claim, which
    comes from fresh processes. A stricter rule would miss more of the real gains.
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
    """Find the parts that the stack does not need, in the order in which to remove them.

    Args:
        stack_less_part: for each part, the step time of the whole stack divided by the step time of
            the stack without this part.

    Returns the parts whose removal slows the stack down by less than 2 % (``WORTHWHILE``), even at
    the lower end of the interval of its ratio.
    """
    spare = [one for one, ratio in stack_less_part.items() if ratio.low > 1 / WORTHWHILE]
    return sorted(spare, key=lambda one: stack_less_part[one].value, reverse=True)


# From steps to blocks


def split_into_blocks(steps: Sequence[Step]) -> list[Block]:
    """Group the steps of a comparison into its blocks, in order.

    Args:
        steps: the steps of one process, in order, see ``ProcessRecord.whole_steps``.
    """
    found: list[Block] = []
    number: int | None = None
    for step in steps:
        if step.arm is None:
            continue
        if step.block != number:
            number = step.block
            found.append(Block(step.arm))
        if step.mark == "first":
            found[-1].first_ms.append(step.step_ms)
        elif step.mark is None:
            found[-1].add(step.step_ms, Size.of(step), step.at_s)
    return found


def find_complete_blocks(steps: Sequence[Step], comparison: Comparison) -> list[Block]:
    """Find the blocks of a comparison that have all their timed steps, in order.

    Args:
        steps: the steps of one process, in order, see ``ProcessRecord.whole_steps``.
        comparison: the comparison that the process has made.
    """
    timed_steps = comparison.block_steps - comparison.discard_steps
    found = split_into_blocks(steps)
    complete = [block for block in found if len(block.times_ms) >= timed_steps]
    return complete if comparison.discard_steps else merge_steps(complete)
