"""Does the plan compute the same? Losses of bare and plan, step by step, from the same seeds.

Pure functions of recorded losses. Every seed has a bare run and a plan run. Their losses must agree
better than bare agrees with itself under another seed: the mean paired difference, with its
confidence limit, must stay within one standard deviation of bare's own seed-to-seed spread
(equivalence by two one-sided t-tests: Schuirmann 1987), in both halves of the second half of the
steps and for each backward call of the step. No single step may stand out.

A program that seeds itself gives the same losses whatever seed flatout sets, so there is no such
spread. The yardstick is then the scatter from batch to batch: the standard error that it gives the
mean over a window is the least that any other data order would change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from flatout.plan import LossEvidence
from flatout.record import Step

Curve = tuple[float, ...]
"""Losses of one backward call of the step, in the order of the steps."""

SPIKE_DEVIATIONS = 6.0
"""Standard deviations of bare's spread at which a single step stands out."""

SITES_LIMIT = 8
"""Backward calls of a step up to which each is looked at on its own (more: their mean)."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Verdict:
    """What the losses say.

    Attributes:
        passed: whether the plan computes the same within the margins.
        why: the reason, one clause.
        kind: ``"bitwise"`` where all losses are identical, else ``"non-inferior"``.
        steps: how many steps from the start were compared.
        bare_repeats: whether bare gave identical losses twice from one seed.
        losses: the figures for each backward call of the step.
    """

    passed: bool
    why: str
    kind: str
    steps: int
    bare_repeats: bool
    losses: tuple[LossEvidence, ...]


def curves(steps: Sequence[Step]) -> tuple[Curve, ...]:
    """The loss curves of a run, one for each backward call of the step.

    Steps with another number of backward calls than most are left out, and so are the calls whose
    loss could not be read; none at all gives no curves.
    """
    common = Counter(len(step.losses) for step in steps).most_common(1)
    sites = common[0][0] if common else 0
    rows = [step.losses for step in steps if len(step.losses) == sites]
    readable: list[Curve] = []
    for site in range(sites):
        curve = [value for row in rows if (value := row[site]) is not None]
        if len(curve) == len(rows):
            readable.append(tuple(curve))
    if len(readable) > SITES_LIMIT:
        return (tuple(fmean(values) for values in zip(*readable, strict=True)),)
    return tuple(readable)


def judge(
    bare: Sequence[tuple[Curve, ...]],
    plan: Sequence[tuple[Curve, ...]],
    repeat: tuple[Curve, ...],
    bitwise: bool = False,
) -> Verdict:
    """Compare the losses of bare and plan.

    Args:
        bare, plan: curves of one run for each seed, in the same order of seeds.
        repeat: a second bare run from the first seed.
        bitwise: ask for identical losses.
    """
    runs = [*bare, *plan]
    sites = len(bare[0])
    steps = min((len(curve) for run in runs for curve in run), default=0)

    def verdict(passed: bool, why: str, losses: Sequence[LossEvidence] = ()) -> Verdict:
        same = all(one == other for one, other in zip(bare, plan, strict=True))
        kind = "bitwise" if same else "non-inferior"
        return Verdict(passed, why, kind, steps, repeats, tuple(losses))

    shared = min(map(len, (*repeat, *bare[0])), default=0)
    repeats = len(repeat) == sites and all(
        one[:shared] == other[:shared] for one, other in zip(bare[0], repeat, strict=True)
    )
    if not sites or not steps:
        return verdict(False, "no loss could be read")
    if any(len(run) != sites for run in runs):
        return verdict(False, "the plan changes the number of backward calls of a step")
    bare = [tuple(curve[:steps] for curve in run) for run in bare]
    plan = [tuple(curve[:steps] for curve in run) for run in plan]
    losses: list[LossEvidence] = []
    failure: str | None = None
    for site in range(sites):
        evidence, why = _judge_site(
            [run[site] for run in bare],
            [run[site] for run in plan],
            [repeat[site][:steps]] if len(repeat) == sites else [],
        )
        name = "the loss" if sites == 1 else f"loss {site + 1} of {sites}"
        if evidence is not None:
            losses.append(evidence)
        if why is not None and failure is None:
            failure = f"{name} {why}"
    if failure is None and bitwise and bare != plan:
        failure = "the losses are not identical"
        if not repeats:
            failure += ", nor are those of two bare runs: that they are cannot be proven"
    return verdict(failure is None, failure or "all losses agree", losses)


def _judge_site(
    bare: Sequence[Curve], plan: Sequence[Curve], repeat: Sequence[Curve]
) -> tuple[LossEvidence | None, str | None]:
    """The evidence of one backward call, and why it fails (``None``: it does not)."""
    for whose, runs in (("bare", bare), ("the plan", plan)):
        for run in runs:
            for number, value in enumerate(run):
                if not math.isfinite(value):
                    return None, f"is not finite at step {number} under {whose}"
    steps = len(bare[0])
    window = max(steps // 4, 1)
    windows = [range(steps - 2 * window, steps - window), range(steps - window, steps)]
    if steps < 4:
        windows = [range(steps)]
    by_seeds = _seeds_matter(bare, repeat)
    scatter = _seed_scatter(bare) if by_seeds else _batch_scatter(bare[0])
    margin = (
        math.sqrt(fmean(stdev(_means(bare, part)) ** 2 for part in windows))
        if by_seeds
        else scatter / math.sqrt(window)
    )
    limit, difference = max(
        (_confidence_limit(bare, plan, part) for part in windows), key=lambda pair: pair[0]
    )
    evidence = LossEvidence(
        bare_final=fmean(_means(bare, windows[-1])),
        plan_final=fmean(_means(plan, windows[-1])),
        difference=difference,
        margin=margin,
        yardstick="seeds" if by_seeds else "batches",
    )
    for mine, other in zip(plan, bare, strict=True):
        for number, (value, expected) in enumerate(zip(mine, other, strict=True)):
            if abs(value - expected) > SPIKE_DEVIATIONS * scatter:
                return evidence, (
                    f"stands out at step {number}: {value:.4g} under the plan, {expected:.4g} bare"
                )
    if limit > margin:
        return evidence, (
            f"differs by {difference:+.3g} on average (up to {limit:.3g} with "
            f"{CONFIDENCE:.0%} confidence), more than bare's own spread of {margin:.3g}"
        )
    return evidence, None


def _seeds_matter(bare: Sequence[Curve], repeat: Sequence[Curve]) -> bool:
    """Whether another seed changes bare's losses, beyond what repeating it does."""
    if len(bare) < 2:
        return False
    first = bare[0]
    noise = max((_distance(first, curve) for curve in repeat), default=0.0)
    return min(_distance(first, curve) for curve in bare[1:]) > 4 * noise


def _distance(one: Curve, other: Curve) -> float:
    """Root mean square difference over the steps that both have."""
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=False)]
    return math.sqrt(fmean(squares)) if squares else 0.0


def _seed_scatter(bare: Sequence[Curve]) -> float:
    """Standard deviation of the loss of one step between seeds, pooled over all steps."""
    return math.sqrt(fmean(stdev(values) ** 2 for values in zip(*bare, strict=True)))


def _batch_scatter(curve: Curve) -> float:
    """Standard deviation of the loss around its trend, from differences of successive steps."""
    jumps = [after - before for before, after in pairwise(curve)]
    return stdev(jumps) / math.sqrt(2) if len(jumps) > 1 else 0.0


def _means(runs: Sequence[Curve], part: range) -> list[float]:
    return [fmean(run[part.start : part.stop]) for run in runs]


def _confidence_limit(
    bare: Sequence[Curve], plan: Sequence[Curve], part: range
) -> tuple[float, float]:
    """One-sided limit of the size of the mean paired difference over a window, and that mean."""
    from scipy import stats  # type: ignore[import-untyped]

    differences = [
        mine - other for mine, other in zip(_means(plan, part), _means(bare, part), strict=True)
    ]
    centre = fmean(differences)
    count = len(differences)
    error = stdev(differences) / math.sqrt(count) if count > 1 else 0.0
    quantile = float(stats.t.ppf(CONFIDENCE, count - 1)) if count > 1 else 0.0
    return abs(centre) + quantile * error, centre
