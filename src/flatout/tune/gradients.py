"""Do the first updates get the same gradients? Recorded ones of bare and plan, side by side.

Of each parameter, in each update of each seed: how large the plan's gradient is along bare's, as
the coefficient ``<plan, bare> / <bare, bare>`` over the sampled elements, and how far it is off, as
the relative error ``|plan - bare| / |bare|``. A factor of 1.25 in one gradient turns nothing, so
its direction does not show it, and Adam divides it out again; the coefficient is then 1.25.

Rounding errors point anywhere, so they leave the mean of the coefficient over seeds and updates
where it is. Its confidence interval (Student's t, over all of them, Bonferroni's correction for the
number of parameters: Dunn 1961) tells a factor from noise: a parameter is refused when its whole
interval is further from 1 than the tolerance.

Where the plan draws other random numbers than bare, gradients differ in direction as much as
dropout makes them, but not in size: there the logarithm of the quotient of their norms is tested in
the same way, each against the median of all parameters, and this median on its own.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from flatout.knobs import Exactness
from flatout.plan import Check
from flatout.record import Gradient

RANDOM: tuple[Exactness, ...] = ("resampled", "reshuffled")

CONFIDENCE = 0.99
"""That no parameter is refused for its noise."""

Recorded = Mapping[str, Sequence[Gradient]]


@dataclass(frozen=True)
class Bounds:
    """What is allowed to one exactness class.

    Attributes:
        factor: of a gradient's size, either way, beyond its noise.
        error: relative error of the first gradient, root mean square over the seeds.
        floor: what a gradient may be off by in any case, relative to the norm of all gradients of
            the update: some are zero but for rounding (of a bias before a norm, of a key's bias).
    """

    factor: float
    error: float
    floor: float


REORDERED = Bounds(factor=1.01, error=0.01, floor=1e-5)
REDUCED = Bounds(factor=1.1, error=0.5, floor=2.0**-9)


@dataclass(frozen=True)
class _Measured:
    """One parameter over all seeds and updates.

    Attributes:
        factors: size of the plan's gradient in bare's, by seed and update.
        errors: relative error, one for each seed, of its first gradient that is not zero.
    """

    factors: Mapping[tuple[int, int], float]
    errors: Sequence[float]


def judge(
    bare: Sequence[Recorded], plan: Sequence[Recorded], exactness: Collection[Exactness]
) -> Check:
    """Compare the gradients of the first updates.

    Args:
        bare, plan: what was recorded of each seed, in the same order.
        exactness: what the plan's settings may change.
    """
    names = list(bare[0]) if bare else []
    if not names or not any(plan):
        return Check("gradients", "open", "no gradients were recorded")
    for run, other in zip(bare, plan, strict=True):
        for name in run.keys() ^ other.keys():
            whose = "the plan gives" if name in run else "only the plan gives"
            why = f"{whose} {'no' if name in run else 'a'} gradient to {name}"
            return Check("gradients", "failed", why)
        for name in names:
            for mine, theirs in zip(run.get(name, ()), other.get(name, ()), strict=False):
                if math.isfinite(mine.norm) and not math.isfinite(theirs.norm):
                    why = f"the gradient of {name} is not finite under the plan"
                    return Check("gradients", "failed", why)
    bounds = REDUCED if "reduced" in exactness else REORDERED
    is_random = any(kind in RANDOM for kind in exactness)
    measured = {name: _measured(name, bare, plan, bounds, is_random) for name in names}
    measured = {name: one for name, one in measured.items() if one.factors}
    if not measured:
        return Check("gradients", "open", "no gradient is large enough to be compared")
    if is_random:
        measured = _against_median(measured)
    factors = {
        name: _beyond_noise([*one.factors.values()], len(measured))
        for name, one in measured.items()
    }
    errors = {
        name: math.sqrt(fmean(error**2 for error in one.errors))
        for name, one in measured.items()
        if one.errors
    }
    worst = max(factors, key=lambda name: abs(math.log(factors[name])))
    allowed = REDUCED.factor if is_random else bounds.factor
    figures = {
        "factor": factors[worst],
        "factor_limit": allowed,
        "parameters": float(len(measured)),
    }
    whole = "" if worst == ALL else f"the gradient of {worst}"
    what = whole or "all gradients"
    centre = _centre([*measured[worst].factors.values()])
    if abs(math.log(factors[worst])) > math.log(allowed):
        verb = "is" if whole else "are"
        why = f"{what} {verb} {centre:.4g} times bare's, beyond noise at least {factors[worst]:.4g}"
        return Check("gradients", "failed", why, figures)
    why = f"the sizes of {len(measured)} gradients agree within a factor of {allowed:g}"
    if errors:
        wrong = max(errors, key=lambda name: errors[name])
        figures |= {"error": errors[wrong], "error_limit": bounds.error}
        if errors[wrong] > bounds.error:
            why = (
                f"the first gradient of {wrong} is off by {errors[wrong]:.2g} of its size "
                f"(limit {bounds.error:g})"
            )
            return Check("gradients", "failed", why, figures)
        why += f", and each is off by at most {errors[wrong]:.2g} of its size"
    return Check("gradients", "passed", why, figures)


ALL = ""
"""The name under which the median over all parameters goes."""


def _measured(
    name: str,
    bare: Sequence[Recorded],
    plan: Sequence[Recorded],
    bounds: Bounds,
    is_random: bool,
) -> _Measured:
    factors: dict[tuple[int, int], float] = {}
    errors: list[float] = []
    for seed, (run, other) in enumerate(zip(bare, plan, strict=True)):
        is_first = True
        for update, (ours, theirs) in enumerate(
            zip(run.get(name, ()), other.get(name, ()), strict=False)
        ):
            if not math.isfinite(ours.norm):
                continue
            floor = bounds.floor * _norm_of_all(run, update)
            if is_random:
                if floor:
                    factors[seed, update] = (theirs.norm + floor) / (ours.norm + floor)
                continue
            compared = _compared(ours, theirs, floor)
            if compared is None:
                continue
            factors[seed, update] = compared[0]
            if is_first:
                errors.append(compared[1])
            is_first = False
    return _Measured(factors, errors)


def _norm_of_all(run: Recorded, update: int) -> float:
    squares = (given[update].norm ** 2 for given in run.values() if len(given) > update)
    return math.sqrt(sum(square for square in squares if math.isfinite(square)))


def _compared(ours: Gradient, theirs: Gradient, floor: float) -> tuple[float, float] | None:
    """Coefficient and relative error beyond the floor; ``None``: bare's is zero."""
    import numpy as np

    if ours.sample is not None and theirs.sample is not None:
        mine, others = (np.asarray(g.sample, dtype=np.float64) for g in (ours, theirs))
        size = float(np.linalg.norm(mine))
        if size and len(mine) == len(others):
            off = float(np.linalg.norm(others - mine))
            off -= floor * math.sqrt(len(mine) / ours.elements)
            return float(others @ mine) / size**2, max(off, 0.0) / size
    if ours.norm <= floor:
        return None
    off = abs(theirs.norm - ours.norm) - floor
    return theirs.norm / ours.norm, max(off, 0.0) / ours.norm


def _against_median(measured: Mapping[str, _Measured]) -> dict[str, _Measured]:
    """Factors in units of their median over the parameters, and this median as one more."""
    together: dict[tuple[int, int], list[float]] = {}
    for one in measured.values():
        for place, factor in one.factors.items():
            together.setdefault(place, []).append(factor)
    medians = {place: median(factors) for place, factors in together.items()}
    relative = {
        name: _Measured({p: factor / medians[p] for p, factor in one.factors.items()}, ())
        for name, one in measured.items()
    }
    return {ALL: _Measured(medians, ()), **relative}


def _centre(factors: Sequence[float]) -> float:
    """Of factors that may be noise around zero the mean, else the geometric mean."""
    if min(factors) <= 0:
        return fmean(factors)
    return math.exp(fmean(map(math.log, factors)))


def _beyond_noise(factors: Sequence[float], parameters: int) -> float:
    """The factor in the confidence interval that is closest to 1."""
    from scipy import stats  # type: ignore[import-untyped]

    count = len(factors)
    is_positive = min(factors) > 0
    values = [math.log(factor) for factor in factors] if is_positive else list(factors)
    none = 0.0 if is_positive else 1.0
    centre = fmean(values)
    half = 0.0
    if count > 1:
        tail = (1 - CONFIDENCE) / (2 * parameters)
        half = float(stats.t.ppf(1 - tail, count - 1)) * stdev(values) / math.sqrt(count)
    if abs(centre - none) <= half:
        return 1.0
    closest = centre - math.copysign(half, centre - none)
    return math.exp(closest) if is_positive else max(closest, SMALLEST_FACTOR)


SMALLEST_FACTOR = 1e-6
"""What a gradient that goes against bare's counts as."""
