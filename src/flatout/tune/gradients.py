"""Whether the first updates of bare and plan get the same gradients.

A scale error in one gradient, of 1.25x say, does not change the gradient's direction, and Adam
divides it out again, so that the loss hardly shows it. The gradient norm does. For each parameter,
in each update of each seed, the norm under the plan is divided by the norm under bare. Rounding
errors and other dropout masks scatter the logarithm of this quotient around zero. Its confidence
interval (Student's t over seeds and updates, with Bonferroni's correction for the number of
parameters: Dunn 1961) tells a scale error from noise: a plan is refused if for one parameter the
whole interval lies beyond the tolerance. (The coefficient ``<plan, bare> / <bare, bare>`` would not
do: errors in the activations make it smaller than 1, by up to a tenth in a network with batch norm
in bfloat16.)

Where bare and plan draw the same random numbers, the first gradient that differs must also point in
the same direction: the relative error ``|plan - bare| / |bare|`` over the sampled elements is
bounded. Where they do not, the loss of an update differs, and so all its quotients have a common
factor: each quotient is divided by their median, and the median is tested as well.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from flatout.knob import Exactness
from flatout.plan import Check
from flatout.wire.lines import Gradient

RANDOM: tuple[Exactness, ...] = ("resampled", "reshuffled")
"""Exactness classes of settings that draw other random numbers."""

CONFIDENCE = 0.95
"""Probability that no parameter at all is refused because of noise."""

Recorded = Mapping[str, Sequence[Gradient]]
"""The gradients of one run: for each parameter, those of its first updates in order."""


@dataclass(frozen=True)
class Bounds:
    """How far gradients may differ under settings of an exactness class.

    Attributes:
        factor: largest scale error of a gradient norm, up or down, beyond its noise.
        error: largest relative error of the first gradient that differs, root mean square over
            seeds.
        floor: norm below which a gradient may be nothing but rounding, as a fraction of the norm of
            all gradients of the update. For biases and scales the agent has a better estimate
            (``agent/flows.py``), and the larger of the two counts.
    """

    factor: float
    error: float
    floor: float


REORDERED = Bounds(factor=1.01, error=1e-3, floor=2.0**-20)
"""One rounding in float32 is an error of 2**-24. Eight residual blocks with batch norm amplify the
rounding error of a gradient up to 500 times."""

REDUCED = Bounds(factor=1.1, error=1.2, floor=2.0**-11)
"""One rounding in bfloat16 is an error of 2**-9. Relative errors measured under autocast at the
first step: 0.01 to 0.02 in transformers, 0.2 in three residual blocks with batch norm, 0.9 in eight
(1.4 would be an unrelated gradient of the same norm)."""

COARSE_ROUNDOFF = 2.0**-12
"""Smallest unit roundoff of a program's own arithmetic for which ``REDUCED`` applies. The unit
roundoff of float16 and TF32 is 2**-11, that of bfloat16 2**-8."""

ALL = ""
"""The name of the median over all parameters, beside the names of parameters."""


def judge(
    bare: Sequence[Recorded], plan: Sequence[Recorded], exactness: Collection[Exactness]
) -> Check:
    """Compare the gradients of the first updates.

    Args:
        bare, plan: one run for each seed, in the same order of seeds.
        exactness: what the plan's settings may change.
    """
    if not any(bare) or not any(plan):
        return Check("gradients", "open", "no gradients were recorded")
    why = _find_missing(bare, plan)
    if why is not None:
        return Check("gradients", "failed", why)
    bounds = REDUCED if "reduced" in exactness or are_coarse(bare) else REORDERED
    is_random = any(kind in RANDOM for kind in exactness)
    tolerance = math.log(REDUCED.factor if is_random else bounds.factor)
    sizes = {name: dict(_sizes(name, bare, plan, bounds.floor)) for name in bare[0]}
    sizes = {name: quotients for name, quotients in sizes.items() if quotients}
    if not sizes:
        return Check("gradients", "open", "no gradient is large enough to be compared")
    if is_random:
        sizes = _against_median(sizes)
    intervals = {name: _interval(list(one.values()), len(sizes)) for name, one in sizes.items()}
    worst = max(intervals, key=lambda name: abs(intervals[name][0]) - intervals[name][1])
    centre, half = intervals[worst]
    seen = math.exp(tolerance + median(half for _, half in intervals.values()))
    figures = {
        "parameters": float(len(sizes) - (ALL in sizes)),
        "factor_seen": seen,
        "factor": math.exp(centre),
        "factor_low": math.exp(centre - half),
        "factor_high": math.exp(centre + half),
    }
    if abs(centre) - half > tolerance:
        subject = "all gradients are" if worst == ALL else f"the gradient of {worst} is"
        why = (
            f"{subject} {math.exp(centre):.3g} times bare's "
            f"({math.exp(centre - half):.3g} to {math.exp(centre + half):.3g})"
        )
        return Check("gradients", "failed", why, figures)
    why = (
        f"gradient norms of {figures['parameters']:.0f} parameters match the baseline; for half of "
        f"them a scale error of {seen:.3g}x would have been detected"
    )
    errors = {} if is_random else dict(_errors(bare, plan, bounds.floor))
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        figures |= {"error": errors[worst], "error_limit": bounds.error}
        if errors[worst] > bounds.error:
            why = (
                f"the first gradient of {worst} is off by {errors[worst]:.2g} of its norm "
                f"(limit {bounds.error:g})"
            )
            return Check("gradients", "failed", why, figures)
        why += f"; each gradient is off by at most {errors[worst]:.2g} of its norm"
    return Check("gradients", "passed", why, figures)


def are_coarse(recorded: Sequence[Recorded]) -> bool:
    """Whether a program itself computes any gradient in half precision.

    Another order of the same arithmetic then changes gradients as much as lower precision does.
    """
    return any(
        gradient.roundoff is not None and gradient.roundoff >= COARSE_ROUNDOFF
        for run in recorded
        for given in run.values()
        for gradient in given
    )


def _find_missing(bare: Sequence[Recorded], plan: Sequence[Recorded]) -> str | None:
    """A gradient that only one side has, or that is not finite under the plan, one clause."""
    for run, other in zip(bare, plan, strict=True):
        for name, given in run.items():
            if name not in other:
                return f"the plan gives no gradient to {name}"
            for mine, theirs in zip(given, other[name], strict=False):
                if math.isfinite(mine.norm) and not math.isfinite(theirs.norm):
                    return f"the gradient of {name} is not finite under the plan"
        for name in other:
            if name not in run:
                return f"only the plan gives a gradient to {name}"
    return None


def _pairs(
    name: str, run: Recorded, other: Recorded
) -> Iterator[tuple[int, Gradient, Gradient, float]]:
    """The finite gradients of one parameter.

    Yields the number of the update, the gradients of bare and plan, and the norm of all of bare's
    gradients in that update.
    """
    for update, (mine, theirs) in enumerate(
        zip(run.get(name, ()), other.get(name, ()), strict=False)
    ):
        if math.isfinite(mine.norm):
            squares = (given[update].norm ** 2 for given in run.values() if len(given) > update)
            yield update, mine, theirs, math.sqrt(sum(filter(math.isfinite, squares)))


def _first_other(run: Recorded, other: Recorded) -> int:
    """The first update in which any gradient is not the same to the bit; 0 if all are."""
    return min(
        (
            update
            for name, given in run.items()
            for update, (mine, theirs) in enumerate(zip(given, other.get(name, ()), strict=False))
            if (mine.norm, mine.sample) != (theirs.norm, theirs.sample)
        ),
        default=0,
    )


def _floor(mine: Gradient, theirs: Gradient, of_whole: float) -> float:
    """The norm up to which a gradient may be nothing but rounding, on either side."""
    return max(of_whole, mine.noise or 0.0, theirs.noise or 0.0)


def _sizes(
    name: str, bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> Iterator[tuple[tuple[int, int], float]]:
    """The logarithm of the plan's gradient norm over bare's, by seed and update.

    Gradients below the floor are left out, and so are the updates before the first that differs: a
    setting that does nothing in them is not proven by them.
    """
    for seed, (run, other) in enumerate(zip(bare, plan, strict=True)):
        first = _first_other(run, other)
        for update, mine, theirs, whole in _pairs(name, run, other):
            if update < first:
                continue
            least = _floor(mine, theirs, floor * whole)
            if max(mine.norm, theirs.norm) > least:
                quotient = max(theirs.norm, least) / max(mine.norm, least)
                yield (seed, update), math.log(quotient)


def _against_median(
    sizes: Mapping[str, Mapping[tuple[int, int], float]],
) -> dict[str, dict[tuple[int, int], float]]:
    """The logarithms relative to the median of their update; the medians are there as ``ALL``."""
    together: dict[tuple[int, int], list[float]] = {}
    for one in sizes.values():
        for place, size in one.items():
            together.setdefault(place, []).append(size)
    medians = {place: median(several) for place, several in together.items()}
    relative = {
        name: {place: size - medians[place] for place, size in one.items()}
        for name, one in sizes.items()
    }
    return {ALL: medians, **relative}


def _interval(values: Sequence[float], parameters: int) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval, which is 0 for a single value."""
    from scipy import stats  # type: ignore[import-untyped]

    count = len(values)
    if count < 2:
        return values[0], 0.0
    tail = (1 - CONFIDENCE) / (2 * parameters)
    quantile = float(stats.t.ppf(1 - tail, count - 1))
    return fmean(values), quantile * stdev(values) / math.sqrt(count)


def _errors(
    bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> Iterator[tuple[str, float]]:
    """The relative error of each parameter's gradient in the first update that differs at all.

    Up to that update the weights were the same; some settings do nothing in the first steps.
    Gradients below the floor are left out.
    """
    import numpy as np

    squares: dict[str, list[float]] = {}
    for run, other in zip(bare, plan, strict=True):
        found: dict[int, dict[str, float]] = {}
        for name in run:
            for update, mine, theirs, whole in _pairs(name, run, other):
                least = _floor(mine, theirs, floor * whole)
                if mine.sample is None or theirs.sample is None or mine.norm <= least:
                    continue
                ours, others = (np.asarray(g.sample, np.float64) for g in (mine, theirs))
                size = float(np.linalg.norm(ours))
                if size and len(ours) == len(others):
                    error = float(np.linalg.norm(others - ours)) / size
                    found.setdefault(update, {})[name] = error
        first = min((u for u, errors in found.items() if any(errors.values())), default=0)
        for name, error in found.get(first, {}).items():
            squares.setdefault(name, []).append(error**2)
    for name, several in squares.items():
        yield name, math.sqrt(fmean(several))
