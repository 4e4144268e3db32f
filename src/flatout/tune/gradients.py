"""Checks whether the first updates of bare and plan get the same gradients.

A scale error multiplies one gradient by a constant, such as 1.25. The gradient keeps its direction,
and Adam divides the constant out again, so the loss hardly shows the error. The gradient norm shows
it. For each parameter, update and seed, the gradient norm under the plan is divided by the gradient
norm in the bare program. Rounding errors, and dropout masks that differ from bare's, scatter the
logarithm of this quotient around zero. For each parameter, the confidence interval of the mean
logarithm (Student's t over seeds and updates, with Bonferroni's correction for the number of
parameters: Dunn 1961) tells a scale error from noise. A plan is refused if the whole interval of
any parameter lies beyond the tolerance. (The coefficient ``<plan, bare> / <bare, bare>`` would be a
worse measure than the quotient of the norms: errors in the activations make it smaller than 1, by
up to a tenth in a network with batch norm in bfloat16.)

Where bare and plan draw the same random numbers, gradients must also point in the same direction.
This is checked in the first update in which any gradient differs: the relative error
``|plan - bare| / |bare|`` of each parameter's gradient, over the sampled elements, must be small.
Where bare and plan draw different random numbers, the loss of an update differs, which multiplies
all quotients of the update by a common factor. Each quotient is therefore divided by the median of
the quotients of all parameters in the same update, and these medians are tested as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flatout.knob import Exactness
from flatout.plan import Check
from flatout.wire.lines import Gradient

RANDOM: tuple[Exactness, ...] = ("resampled", "reshuffled")
"""Exactness classes of settings that draw different random numbers than the bare program."""

CONFIDENCE = 0.95
"""Probability that all parameters pass if nothing but noise moves their gradient norms."""

Recorded = Mapping[str, Sequence[Gradient]]
"""The gradients of one run: for each parameter, the gradients of its first updates in order."""


@dataclass(frozen=True)
class Bounds:
    """How far gradients may differ under settings of an exactness class.

    Attributes:
        factor: the largest factor by which a gradient norm may be too large or too small. Noise
            (the half-width of the confidence interval) is allowed in addition.
        error: the largest relative error that a parameter's gradient may have in the first update
            in which any gradient differs. It is the root mean square over the seeds.
        floor: the norm below which a gradient may be nothing but rounding error, as a fraction of
            the norm of all gradients of the update. For biases and scales, the agent (flatout's
            code inside the job) also records such a norm (``agent/flows.py``); the larger of the
            two norms is used.
    """

    factor: float
    error: float
    floor: float


REORDERED = Bounds(factor=1.01, error=1e-3, floor=2.0**-20)
"""The bounds for settings that keep the precision. One rounding to float32 is a relative error of
up to 2**-24. Eight residual blocks with batch norm amplify the rounding error of a gradient up to
500 times."""

REDUCED = Bounds(factor=1.1, error=1.2, floor=2.0**-11)
"""The bounds for settings that lower the precision. One rounding to bfloat16 is a relative error of
up to 2**-8. Relative errors measured under autocast at the first step: 0.01 to 0.02 in
transformers, 0.2 in three residual blocks with batch norm, 0.9 in eight such blocks. (An unrelated
gradient of the same norm would have a relative error of 1.4.)"""

COARSE_ROUNDOFF = 2.0**-12
"""If a program itself computes with at least this unit roundoff, ``REDUCED`` applies to all plans.
The unit roundoff is the largest relative error of one rounding: 2**-11 for float16 and TF32, 2**-8
for bfloat16."""

MEDIAN = ""
"""In mappings from parameter names to log ratios, the key of the median over all parameters."""


def judge(
    bare: Sequence[Recorded], plan: Sequence[Recorded], exactness: Collection[Exactness]
) -> Check:
    """Compare the gradients of the first updates.

    Args:
        bare, plan: the gradients of one run for each seed, in the same order of seeds.
        exactness: the exactness classes of the plan's settings.
    """
    if not any(bare) or not any(plan):
        return Check("gradients", "open", "no gradients were recorded")
    why = _find_missing(bare, plan)
    if why is not None:
        return Check("gradients", "failed", why)
    bounds = REDUCED if "reduced" in exactness or are_coarse(bare) else REORDERED
    is_random = any(kind in RANDOM for kind in exactness)
    # Different random numbers change the norms, so the tolerance is then REDUCED's. But they add no
    # rounding error, so the floor stays that of `bounds`.
    tolerance = math.log(REDUCED.factor if is_random else bounds.factor)
    log_ratios = _collect_log_norm_ratios(bare, plan, bounds.floor)
    if not log_ratios:
        return Check("gradients", "open", "no gradient is large enough to be compared")
    if is_random:
        log_ratios = _divide_by_median(log_ratios)
    intervals = {
        name: _mean_and_half_width(list(of_one.values()), len(log_ratios))
        for name, of_one in log_ratios.items()
    }
    worst = max(intervals, key=lambda name: abs(intervals[name][0]) - intervals[name][1])
    mean, half_width = intervals[worst]
    usual_half_width = statistics.median(width for _, width in intervals.values())
    detectable_factor = math.exp(tolerance + usual_half_width)
    measurements = {
        "parameters": float(len(log_ratios) - (MEDIAN in log_ratios)),
        "factor_detectable": detectable_factor,
        "factor": math.exp(mean),
        "factor_low": math.exp(mean - half_width),
        "factor_high": math.exp(mean + half_width),
    }
    if abs(mean) - half_width > tolerance:
        times = (
            f"{math.exp(mean):.3g} times bare's "
            f"({math.exp(mean - half_width):.3g} to {math.exp(mean + half_width):.3g})"
        )
        if worst == MEDIAN:
            why = f"gradient norms are {times}, in the median of all parameters"
        else:
            why = f"the gradient norm of {worst} is {times}"
            why += ", relative to the median of all parameters" if is_random else ""
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
    """Return whether a program itself computes any gradient in TF32, float16 or bfloat16.

    In such a program, a different order of the same arithmetic changes gradients as much as lower
    precision does. The limit is ``COARSE_ROUNDOFF``.
    """
    return any(
        gradient.roundoff is not None and gradient.roundoff >= COARSE_ROUNDOFF
        for run in recorded
        for gradients_of_parameter in run.values()
        for gradient in gradients_of_parameter
    )


def _find_missing(bare: Sequence[Recorded], plan: Sequence[Recorded]) -> str | None:
    """Return a clause about a gradient that only one side has, or that is finite in bare only.

    The result is ``None`` if there is no such gradient.
    """
    for bare_run, plan_run in zip(bare, plan, strict=True):
        for name, gradients_of_parameter in bare_run.items():
            if name not in plan_run:
                return f"the plan gives no gradient to {name}"
            for of_bare, of_plan in zip(gradients_of_parameter, plan_run[name], strict=False):
                if math.isfinite(of_bare.norm) and not math.isfinite(of_plan.norm):
                    return f"the gradient of {name} is not finite under the plan"
        for name in plan_run:
            if name not in bare_run:
                return f"only the plan gives a gradient to {name}"
    return None


def _matching_gradients(
    name: str, bare_run: Recorded, plan_run: Recorded
) -> Iterator[tuple[int, Gradient, Gradient, float]]:
    """Yield the gradients of one parameter that are finite in the bare run, in order of updates.

    Each item holds the number of the update, the parameter's gradients in bare and plan, and the
    norm of the bare run's gradients of all parameters together.
    """
    for update, (of_bare, of_plan) in enumerate(
        zip(bare_run.get(name, ()), plan_run.get(name, ()), strict=False)
    ):
        if math.isfinite(of_bare.norm):
            squares = (
                gradients_of_parameter[update].norm ** 2
                for gradients_of_parameter in bare_run.values()
                if len(gradients_of_parameter) > update
            )
            yield update, of_bare, of_plan, math.sqrt(sum(filter(math.isfinite, squares)))


def _first_differing_update(bare_run: Recorded, plan_run: Recorded) -> int:
    """Return the first update in which any gradient differs between the runs; 0 if none does."""
    return min(
        (
            update
            for name, gradients_of_parameter in bare_run.items()
            for update, (of_bare, of_plan) in enumerate(
                zip(gradients_of_parameter, plan_run.get(name, ()), strict=False)
            )
            if (of_bare.norm, of_bare.sample) != (of_plan.norm, of_plan.sample)
        ),
        default=0,
    )


def _rounding_norm(of_bare: Gradient, of_plan: Gradient, relative_floor: float) -> float:
    """Return the norm up to which a gradient may be nothing but rounding error, on either side.

    Args:
        of_bare, of_plan: the gradient on both sides.
        relative_floor: ``Bounds.floor`` times the norm of all gradients of the update.
    """
    return max(relative_floor, of_bare.noise or 0.0, of_plan.noise or 0.0)


def _collect_log_norm_ratios(
    bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> dict[str, dict[tuple[int, int], float]]:
    """Return the ``_log_norm_ratios`` of each parameter by its name; a parameter that has none is
    left out."""
    names = dict.fromkeys(name for run in bare for name in run)
    found = {name: dict(_log_norm_ratios(name, bare, plan, floor)) for name in names}
    return {name: of_one for name, of_one in found.items() if of_one}


def _log_norm_ratios(
    name: str, bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> Iterator[tuple[tuple[int, int], float]]:
    """Yield seed and update, and the logarithm of the plan's gradient norm divided by bare's.

    A gradient is left out if it may be nothing but rounding error in both bare and plan. Updates
    before the first difference between bare and plan are left out: no setting acted on them yet.
    """
    for seed, (bare_run, plan_run) in enumerate(zip(bare, plan, strict=True)):
        first = _first_differing_update(bare_run, plan_run)
        for update, of_bare, of_plan, total_norm in _matching_gradients(name, bare_run, plan_run):
            if update < first:
                continue
            rounding = _rounding_norm(of_bare, of_plan, floor * total_norm)
            if max(of_bare.norm, of_plan.norm) > rounding:
                quotient = max(of_plan.norm, rounding) / max(of_bare.norm, rounding)
                yield (seed, update), math.log(quotient)


def _divide_by_median(
    log_ratios: Mapping[str, Mapping[tuple[int, int], float]],
) -> dict[str, dict[tuple[int, int], float]]:
    """Divide each ratio by the median ratio of its update.

    The result also has the medians themselves, under the key ``MEDIAN``. All ratios are given and
    returned as logarithms.
    """
    of_updates: dict[tuple[int, int], list[float]] = {}
    for of_one in log_ratios.values():
        for update, log_ratio in of_one.items():
            of_updates.setdefault(update, []).append(log_ratio)
    medians = {update: statistics.median(several) for update, several in of_updates.items()}
    relative = {
        name: {update: log_ratio - medians[update] for update, log_ratio in of_one.items()}
        for name, of_one in log_ratios.items()
    }
    return {MEDIAN: medians, **relative}


def _mean_and_half_width(values: Sequence[float], parameters: int) -> tuple[float, float]:
    """Return the mean and the half-width of its confidence interval.

    Args:
        values: the values, at least one. If there is only one, the half-width is 0.
        parameters: the number of parameters, for Bonferroni's correction.
    """
    from scipy import stats  # type: ignore[import-untyped]

    count = len(values)
    if count < 2:
        return values[0], 0.0
    tail = (1 - CONFIDENCE) / (2 * parameters)
    quantile = float(stats.t.ppf(1 - tail, count - 1))
    half_width = quantile * statistics.stdev(values) / math.sqrt(count)
    return statistics.fmean(values), half_width


def _errors(
    bare: Sequence[Recorded], plan: Sequence[Recorded], floor: float
) -> Iterator[tuple[str, float]]:
    """Yield the relative error of each parameter's gradient in the first update with a difference.

    This update need not be the very first one, because some settings do nothing in the first steps.
    Gradients that may be nothing but rounding error are ignored: no error is yielded for them, and
    an update in which only they differ is not an update with a difference.
    """
    import numpy as np

    squares: dict[str, list[float]] = {}
    for bare_run, plan_run in zip(bare, plan, strict=True):
        found: dict[int, dict[str, float]] = {}
        for name in bare_run:
            for update, of_bare, of_plan, total in _matching_gradients(name, bare_run, plan_run):
                rounding = _rounding_norm(of_bare, of_plan, floor * total)
                if of_bare.sample is None or of_plan.sample is None or of_bare.norm <= rounding:
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
        yield name, math.sqrt(statistics.fmean(several))
