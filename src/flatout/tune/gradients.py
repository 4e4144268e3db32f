"""Whether the first updates of bare and plan get the same gradients.

A scale error in one gradient, of 1.25x say, does not change the gradient's direction, and Adam
divides it out again, so that the loss hardly shows it. The gradient norm does. For each parameter,
in each update of each seed, the norm under the plan is divided by the norm under bare. Rounding
errors and other dropout masks scatter the logarithm of this quotient around zero. For each
parameter, the confidence interval of the mean logarithm (Student's t over seeds and updates, with
Bonferroni's correction for the number of parameters: Dunn 1961) tells a scale error from noise: a
plan is refused if for one parameter the whole interval lies beyond the tolerance. (The coefficient
``<plan, bare> / <bare, bare>`` would not do: errors in the activations make it smaller than 1, by
up to a tenth in a network with batch norm in bfloat16.)

Where bare and plan draw the same random numbers, the first gradient that differs must also point in
the same direction: the relative error ``|plan - bare| / |bare|`` over the sampled elements is
bounded. Where bare and plan draw different random numbers, the loss of an update differs, and so
all its quotients have a common factor: each quotient is divided by the median over all parameters
of that update, and these medians are tested as well.
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

MEDIAN = ""
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
    # Other random numbers move norms more than reordering does; the floor concerns rounding alone.
    tolerance = math.log(REDUCED.factor if is_random else bounds.factor)
    log_ratios = _collect_log_norm_ratios(bare, plan, bounds.floor)
    if not log_ratios:
        return Check("gradients", "open", "no gradient is large enough to be compared")
    if is_random:
        log_ratios = _against_median(log_ratios)
    intervals = {
        name: _mean_and_half_width(list(of_one.values()), len(log_ratios))
        for name, of_one in log_ratios.items()
    }
    worst = max(intervals, key=lambda name: abs(intervals[name][0]) - intervals[name][1])
    centre, half_width = intervals[worst]
    detectable_factor = math.exp(tolerance + median(width for _, width in intervals.values()))
    measurements = {
        "parameters": float(len(log_ratios) - (MEDIAN in log_ratios)),
        "factor_seen": detectable_factor,
        "factor": math.exp(centre),
        "factor_low": math.exp(centre - half_width),
        "factor_high": math.exp(centre + half_width),
    }
    if abs(centre) - half_width > tolerance:
        subject = "all gradients are" if worst == MEDIAN else f"the gradient of {worst} is"
        why = (
            f"{subject} {math.exp(centre):.3g} times bare's "
            f"({math.exp(centre - half_width):.3g} to {math.exp(centre + half_width):.3g})"
        )
        return Check("gradients", "failed", why, measurements)
    why = (
        f"gradient norms of {measurements['parameters']:.0f} parameters match the baseline; for "
        f"half of them a scale error of {detectable_factor:.3g}x would have been detected"
    )
    errors = {} if is_random else dict(_errors(bare, plan, bounds.floor))
    if errors:
        worst = max(errors, key=lambda name: errors[name])
        measurements |= {"error": errors[worst], "error_limit": bounds.error}
        if errors[worst] > bounds.error:
            why = (
                f"the first gradient of {worst} is off by {errors[worst]:.2g} of its norm "
                f"(limit {bounds.error:g})"
            )
            return Check("gradients", "failed", why, measurements)
        why += f"; each gradient is off by at most {errors[worst]:.2g} of its norm"
    return Check("gradients", "passed", why, measurements)


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
    for bare_run, plan_run in zip(bare, plan, strict=True):
        for name, given in bare_run.items():
            if name not in plan_run:
                return f"the plan gives no gradient to {name}"
            for of_bare, of_plan in zip(given, plan_run[name], strict=False):
                if math.isfinite(of_bare.norm) and not math.isfinite(of_plan.norm):
                    return f"the gradient of {name} is not finite under the plan"
        for name in plan_run:
            if name not in bare_run:
                return f"only the plan gives a gradient to {name}"
    return None


def _pairs(
    name: str, bare_run: Recorded, plan_run: Recorded
) -> Iterator[tuple[int, Gradient, Gradient, float]]:
    """The finite gradients of one parameter.

    Yields the number of the update, the gradients of bare and plan, and the norm of all of bare's
    gradients in that update.
    """
    for update, (of_bare, of_plan) in enumerate(
        zip(bare_run.get(name, ()), plan_run.get(name, ()), strict=False)
    ):
        if math.isfinite(of_bare.norm):
            squares = (
                given[update].norm ** 2 for given in bare_run.values() if len(given) > update
            )
            yield update, of_bare, of_plan, math.sqrt(sum(filter(math.isfinite, squares)))


def _first_differing_update(bare_run: Recorded, plan_run: Recorded) -> int:
    """The first update in which any gradient is not the same to the bit; 0 if all are."""
    return min(
        (
            update
            for name, given in bare_run.items()
            for update, (of_bare, of_plan) in enumerate(
                zip(given, plan_run.get(name, ()), strict=False)
            )
            if (of_bare.norm, of_bare.sample) != (of_plan.norm, of_plan.sample)
        ),
        default=0,
    )


def _floor(of_bare: Gradient, of_plan: Gradient, of_update: float) -> float:
    """The norm up to which a gradient may be nothing but rounding, on either side.

    Args:
        of_bare, of_plan: the gradient on both sides.
        of_update: this norm as given by the norm of all gradients of the update, see ``Bounds``.
    """
    return max(of_update, of_bare.noise or 0.0, of_plan.noise or 0.0)


def _collect_log_norm_ratios(
    bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> dict[str, dict[tuple[int, int], float]]:
    """What ``_log_norm_ratios`` gives for each parameter, if it gives anything."""
    found = {name: dict(_log_norm_ratios(name, bare, plan, floor)) for name in bare[0]}
    return {name: of_one for name, of_one in found.items() if of_one}


def _log_norm_ratios(
    name: str, bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> Iterator[tuple[tuple[int, int], float]]:
    """The logarithm of the plan's gradient norm over bare's, by seed and update.

    Gradients below the floor are left out, and so are the updates before the first that differs: a
    setting that does nothing in them is not proven by them.
    """
    for seed, (bare_run, plan_run) in enumerate(zip(bare, plan, strict=True)):
        first = _first_differing_update(bare_run, plan_run)
        for update, of_bare, of_plan, whole in _pairs(name, bare_run, plan_run):
            if update < first:
                continue
            least = _floor(of_bare, of_plan, floor * whole)
            if max(of_bare.norm, of_plan.norm) > least:
                quotient = max(of_plan.norm, least) / max(of_bare.norm, least)
                yield (seed, update), math.log(quotient)


def _against_median(
    log_ratios: Mapping[str, Mapping[tuple[int, int], float]],
) -> dict[str, dict[tuple[int, int], float]]:
    """The logarithms less the median of their update; the medians are there as ``MEDIAN``."""
    of_updates: dict[tuple[int, int], list[float]] = {}
    for of_one in log_ratios.values():
        for update, log_ratio in of_one.items():
            of_updates.setdefault(update, []).append(log_ratio)
    medians = {update: median(several) for update, several in of_updates.items()}
    relative = {
        name: {update: log_ratio - medians[update] for update, log_ratio in of_one.items()}
        for name, of_one in log_ratios.items()
    }
    return {MEDIAN: medians, **relative}


def _mean_and_half_width(values: Sequence[float], parameters: int) -> tuple[float, float]:
    """The mean, and half the width of its confidence interval; that is 0 for a single value."""
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
    for bare_run, plan_run in zip(bare, plan, strict=True):
        found: dict[int, dict[str, float]] = {}
        for name in bare_run:
            for update, of_bare, of_plan, whole in _pairs(name, bare_run, plan_run):
                least = _floor(of_bare, of_plan, floor * whole)
                if of_bare.sample is None or of_plan.sample is None or of_bare.norm <= least:
                    continue
                x, y = (np.asarray(g.sample, np.float64) for g in (of_bare, of_plan))
                size = float(np.linalg.norm(x))
                if size and len(x) == len(y):
                    error = float(np.linalg.norm(y - x)) / size
                    found.setdefault(update, {})[name] = error
        first = min((u for u, errors in found.items() if any(errors.values())), default=0)
        for name, error in found.get(first, {}).items():
            squares.setdefault(name, []).append(error**2)
    for name, several in squares.items():
        yield name, math.sqrt(fmean(several))
