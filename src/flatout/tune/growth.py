"""Checks whether the memory of a plan grows without end, compared with the bare program's memory.

The pairs of a proof are short, and in a short run a cache that fills up looks like a leak. So these
pairs can only raise a suspicion. A longer pair of runs then decides whether there is a leak, if the
budget has time for it. If this is not decided, the plan is kept, and the proof says what was seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

from flatout.plan import Check, Result
from flatout.tune import formatting, memory, pairs
from flatout.tune.pairs import Pairs
from flatout.tune.proof import Verdict
from flatout.tune.stage import TuneStage
from flatout.tune.trial import Trial, TrialFailedError
from flatout.wire.ratios import CONFIDENCE, t_quantile
from flatout.wire.record import Step

LEAK_STEPS = 2000
"""Memory *grows* if its peak, rising at the measured rate, would pass the allowed peak within this
many more steps. (These steps are not run.)"""

FEWEST_STEPS = 16
"""Growth is measured only in runs with at least this many steps."""

SEGMENTS = 8
"""Number of equal parts into which the second half of a run is split. The growth in each part
is one observation. An allocator takes memory in large pieces, so memory grows in jumps; if memory
leaks, most of the parts contain such a jump."""

LONGER_STEPS = 400
"""Minimum number of steps of the longer runs that decide whether memory grows without end. Only the
second half of a run is measured, so a cache that fills up during the first 200 of these steps does
not count as growth."""

LONGER_S = 2.0
"""The steps of a longer run take at least this many seconds, because memory is read only every
20 ms."""

LONGER_FACTOR = 2
"""The longer runs have at least this many times as many steps as the shorter runs."""

_MEMORY_SHARE = 0.5
"""Share of the available memory that the growth in a longer run may take."""


@dataclass(frozen=True)
class Growth:
    """How much faster memory grows under a plan than under bare, in the second half of each run.

    Attributes:
        result: ``grows`` if memory was shown to grow beyond what is allowed, ``stays`` if it
            grows by no more than is allowed, ``open`` if only a longer run can tell.
        value, low, high: by how many bytes per step the plan's memory grows more than bare's: the
            mean, and the bounds of its confidence interval.
        steps: the number of steps of each run; if they differ, the smallest number.
        pairs: the number of pairs of runs.
    """

    result: Literal["grows", "stays", "open"]
    value: float
    low: float
    high: float
    steps: int
    pairs: int

    def describe(self) -> str:
        """Return what was seen, as a clause."""
        low, value, high = (one / 1024 for one in (self.low, self.value, self.high))
        return (
            f"its memory grows by {value:.0f} KiB a step more than bare's ({low:.0f} to {high:.0f} "
            f"KiB, over {formatting.count(self.steps, 'step')} in "
            f"{formatting.count(self.pairs, 'pair')})"
        )

    @property
    def check(self) -> Check:
        """The check for the proof of a plan."""
        result: Result = "failed"
        why = f"{self.describe()}, and does not stop"
        if self.result == "stays":
            result, why = "passed", f"its memory does not keep growing over {self.steps} steps"
        elif self.result == "open":
            result, why = "open", f"{self.describe()}; whether the growth stops is not decided"
        bounds = {"low": self.low, "growth": self.value, "high": self.high}
        kib = {f"{name}_kib_a_step": one / 1024 for name, one in bounds.items()}
        return Check(memory.CHECK_NAME, result, why, kib)


def measure_growth(
    bare: Sequence[Sequence[Step]],
    plan: Sequence[Sequence[Step]],
    allowed: float,
    is_longer: bool = False,
) -> Growth | None:
    """Measure how much faster the peak memory grows under a plan than under bare.

    Only the second half of each run counts. Memory *grows* if, at this rate, the peak would be more
    than is allowed after ``LEAK_STEPS`` more steps. Only longer runs can show that, because at
    first a cache that fills up looks like a leak.

    Args:
        bare, plan: the steps of each run, in pairs.
        allowed: the peak memory that the plan may have, as a multiple of bare's.
        is_longer: whether these runs were made to decide what shorter runs have left open.

    Returns the growth; ``None`` if memory was not measured, or if there are too few steps.
    """
    read_peak, bare_peak, plan_peak = memory.find_peaks(bare, plan)
    if bare_peak is None or plan_peak is None:
        return None
    counts, excesses = [], []
    for one, other in zip(bare, plan, strict=False):
        peaks = [(read_peak(less), read_peak(more)) for less, more in zip(one, other, strict=False)]
        both = [more - less for less, more in peaks if less is not None and more is not None]
        if len(both) >= FEWEST_STEPS:
            counts.append(len(both))
            excesses += _split_growth(both)
    if not counts:
        return None
    value = fmean(excesses)
    quantile = t_quantile((1 + CONFIDENCE) / 2, len(excesses) - 1)
    half_width = quantile * stdev(excesses) / math.sqrt(len(excesses))
    low, high = value - half_width, value + half_width
    allowed_bytes = memory.limit_bytes(bare_peak, allowed, read_peak)
    spare_bytes = min(allowed_bytes - plan_peak, (allowed - 1) * bare_peak)
    limit = max(spare_bytes, 0.0) / LEAK_STEPS
    result: Literal["grows", "stays", "open"] = "open"
    if high <= limit or (value <= limit and low <= 0):
        result = "stays"
    elif is_longer and low > 0 and fmean(excesses[-SEGMENTS // 4 :]) > 0:
        is_long_enough = min(counts) >= LONGER_STEPS and value > limit
        if is_long_enough or plan_peak > allowed_bytes:
            result = "grows"
    return Growth(result, value, low, high, min(counts), len(counts))


def _split_growth(excess_bytes: Sequence[int]) -> list[float]:
    """Return the growth per step in each of the ``SEGMENTS`` parts of the second half of a run.

    Args:
        excess_bytes: by how much the plan's peak is above bare's at each step.
    """
    half = len(excess_bytes) // 2
    width = (len(excess_bytes) - 1 - half) / SEGMENTS
    bounds = [half + round(width * number) for number in range(SEGMENTS + 1)]
    return [
        (excess_bytes[last] - excess_bytes[first]) / (last - first)
        for first, last in pairwise(bounds)
        if last > first
    ]


def choose_longer_steps(growth: Growth, step_s: float, job_steps: int | None) -> int:
    """Return the number of steps of each of the two longer runs, which tell whether memory grows.

    The number is smaller than usual if the growth would otherwise take more than ``_MEMORY_SHARE``
    of the available memory, or if the job ends earlier.

    Args:
        growth: what the shorter runs have shown.
        step_s: the time of a step of the bare program, in seconds.
        job_steps: the number of steps of the whole job; ``None`` if it is not known.
    """
    import psutil

    steps = max(LONGER_STEPS, LONGER_FACTOR * growth.steps, math.ceil(LONGER_S / step_s))
    if growth.high > 0:
        affordable_bytes = _MEMORY_SHARE * psutil.virtual_memory().available
        steps = min(steps, growth.steps + int(affordable_bytes / growth.high))
    return min(steps, job_steps or steps)


def was_shown(verdict: Verdict) -> bool:
    """Return whether a verdict says that memory grows without end."""
    return any(
        check.name == memory.CHECK_NAME and check.result == "failed" for check in verdict.checks
    )


class GrowthCheck(TuneStage):
    """Checks whether memory grows without end under the proven plans of one job."""

    def check(self, finished: Pairs, verdict: Verdict) -> tuple[Verdict, str | None]:
        """Find out whether the memory of a plan grows without end.

        Args:
            finished: the pairs of the plan's proof, which has passed.
            verdict: the verdict on these pairs.

        Returns the verdict and the reason why the plan cannot be used; the reason is ``None`` if
        the plan can be used. If there was a suspicion, a check of the memory is added to the
        verdict. None is added if the program could not complete a longer run under the plan.

        Raises:
            UserError: the program fails without any settings.
        """
        growth = measure_growth(
            finished.steps(finished.baseline_runs),
            finished.steps(finished.variant_runs),
            self._options.memory,
        )
        job_steps = self._bare.job_steps
        if growth is None or growth.result == "stays":
            return verdict, None
        if job_steps is not None and job_steps <= growth.steps:
            return verdict, None  # the job ends before its memory could grow any further
        try:
            growth = self._prolong(growth, finished) or growth
        except TrialFailedError as failure:
            return verdict, f"it fails in a longer run: {failure}"
        except KeyboardInterrupt:
            finished.interrupted = True
        check = growth.check
        self._ledger.print_line(check.why)
        verdict = dataclasses.replace(verdict, checks=(*verdict.checks, check))
        return verdict, check.why if growth.result == "grows" else None

    def _prolong(self, growth: Growth, finished: Pairs) -> Growth | None:
        """Measure the growth in a longer pair of runs.

        The result is ``None`` if there is no time for such runs, if they could not have more steps
        than the shorter runs, or if memory was not measured.

        Raises:
            TrialFailedError: the plan fails.
            UserError: the program fails without any settings.
        """
        steps = choose_longer_steps(growth, self._bare.pace.step_s, self._bare.job_steps)
        lasts_s = 2 * self._bare.pace.seconds(steps)
        if steps <= growth.steps or not self._ledger.has_time_for(lasts_s):
            return None
        self._ledger.print_line(
            f"{growth.describe()}; two runs of {steps} steps, which take about "
            f"{formatting.duration(lasts_s)}, show whether the growth stops"
        )
        self._ledger.begin("checking whether the memory keeps growing")
        try:
            bare = self._run(finished.baseline, steps)
        except TrialFailedError as failure:
            raise pairs.to_user_error("the program fails when it runs again", failure) from failure
        plan = self._run(finished.variant, steps)
        return measure_growth(
            [bare.process.loop_steps],
            [plan.process.loop_steps],
            self._options.memory,
            is_longer=True,
        )

    def _run(self, settings: Mapping[str, str], steps: int) -> Trial:
        return pairs.run_once(
            self._trials,
            settings,
            pace=self._bare.pace,
            steps=steps,
            seed=self._options.seed,
        )
