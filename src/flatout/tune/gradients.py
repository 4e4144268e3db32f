"""Do the first updates get the same gradients? Recorded ones of bare and plan, side by side.

A factor of 1.25 in one gradient turns nothing, so its direction does not show it, and Adam divides
it out again, so the loss hardly does. Its size shows it: for each parameter, in each update of each
seed, the norm of the plan's gradient over that of bare's. Rounding errors scatter the logarithm of
this quotient, and so do other dropout masks, but around zero. Its confidence interval (Student's t
over seeds and updates, with Bonferroni's correction for the number of parameters: Dunn 1961) tells
a factor from noise: a plan is refused when for one parameter the whole interval lies beyond the
tolerance. (Not so the coefficient ``<plan, bare> / <bare, bare>``: errors in the activations make
it smaller than 1, by up to a tenth in a network with batch norm in bfloat16.)

Where bare and plan draw the same random numbers, the first gradient that is another must also point
the same way: the relative error ``|plan - bare| / |bare|`` over the sampled elements is bounded.
Where they do not, the quotients of one update have a common part, since its loss is another: each
is taken against their median, and the median is tested as well.
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

CONFIDENCE = 0.95
"""That no parameter at all is refused for its noise."""

Recorded = Mapping[str, Sequence[Gradient]]


@dataclass(frozen=True)
class Bounds:
    """What is allowed to settings of an exactness class.

    Attributes:
        factor: of a gradient's size, either way, beyond its noise.
        error: relative error of the first gradient that is another, root mean square over seeds.
        floor: norm below which a gradient may be nothing but rounding, relative to the norm of all
            gradients of the update; of biases and scales the agent knows better
            (``agent/flows.py``), and the larger of the two counts.
    """

    factor: float
    error: float
    floor: float


REORDERED = Bounds(factor=1.01, error=1e-3, floor=2.0**-20)
"""Rounding is 2**-24 in float32. Eight residual blocks with batch norm amplify the rounding of a
gradient by up to 500."""

REDUCED = Bounds(factor=1.1, error=1.2, floor=2.0**-11)
"""Rounding is 2**-9 in bfloat16. Measured under autocast at the first step: relative errors of 0.01
to 0.02 in transformers, 0.2 in three residual blocks with batch norm, 0.9 in eight (1.4 would be
another gradient of the same size)."""

COARSE_ROUNDOFF = 2.0**-12
"""Unit roundoff from which on a program's own arithmetic is as coarse as what ``REDUCED`` is for:
that of float16 and TF32 is 2**-11, of bfloat16 2**-8."""

ALL = ""
"""The name under which the median over all parameters goes."""


def judge(
    bare: Sequence[Recorded], plan: Sequence[Recorded], exactness: Collection[Exactness]
) -> Check:
    """Compare the gradients of the first updates.

    Args:
        bare, plan: what was recorded of each seed, in the same order.
        exactness: what the plan's settings may change.
    """
    if not any(bare) or not any(plan):
        return Check("gradients", "open", "no gradients were recorded")
    why = _missing(bare, plan)
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
        what = "all gradients are" if worst == ALL else f"the gradient of {worst} is"
        why = (
            f"{what} {math.exp(centre):.3g} times bare's "
            f"({math.exp(centre - half):.3g} to {math.exp(centre + half):.3g})"
        )
        return Check("gradients", "failed", why, figures)
    why = (
        f"the gradients of {figures['parameters']:.0f} parameters agree in size; half of them "
        f"would have shown a factor of {seen:.3g}"
    )
    errors = {} if is_random else dict(_errors(bare, plan, bounds.floor))
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        figures |= {"error": errors[worst], "error_limit": bounds.error}
        if errors[worst] > bounds.error:
            why = (
                f"the first gradient of {worst} is off by {errors[worst]:.2g} of its size "
                f"(limit {bounds.error:g})"
            )
            return Check("gradients", "failed", why, figures)
        why += f"; each is off by at most {errors[worst]:.2g} of its size"
    return Check("gradients", "passed", why, figures)


def are_coarse(recorded: Sequence[Recorded]) -> bool:
    """Whether a program computes its gradients in half precision, whatever else it does: another
    order of the same arithmetic then changes them as much as lower precision does."""
    return any(
        gradient.roundoff is not None and gradient.roundoff >= COARSE_ROUNDOFF
        for run in recorded
        for given in run.values()
        for gradient in given
    )


def _missing(bare: Sequence[Recorded], plan: Sequence[Recorded]) -> str | None:
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
    """The finite gradients of one parameter, with the norm of all gradients of the update."""
    for update, (mine, theirs) in enumerate(
        zip(run.get(name, ()), other.get(name, ()), strict=False)
    ):
        if math.isfinite(mine.norm):
            squares = (given[update].norm ** 2 for given in run.values() if len(given) > update)
            yield update, mine, theirs, math.sqrt(sum(filter(math.isfinite, squares)))


def _first_other(run: Recorded, other: Recorded) -> int:
    """The first update in which any gradient is not the same to the bit; 0: all are."""
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
    """The norm up to which a gradient is nothing but rounding, on one side or the other."""
    return max(of_whole, mine.noise or 0.0, theirs.noise or 0.0)


def _sizes(
    name: str, bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> Iterator[tuple[tuple[int, int], float]]:
    """Logarithm of the plan's norm over bare's, by seed and update; nothing below the floor, and
    nothing of the updates before the first that differs: a setting that leaves these as they are is
    not proven by them."""
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
    """Mean, and half the width of its confidence interval; of one value, which has none, 0."""
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
    """Of each parameter's gradient above the floor in the first update that differs at all.

    Up to there the weights were the same. Some settings leave the first steps as they are.
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
