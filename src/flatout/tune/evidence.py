"""Makes the evidence of a plan from a proof, and merges it with the evidence of a later proof.

A new proof replaces the old one only if it proves at least as much (``merge``); otherwise the new
proof is stored beside the old one. The functions are pure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import median

from flatout.plan import Evidence, Reference, Verified, today
from flatout.tune.pairs import Pairs
from flatout.tune.proof import Verdict
from flatout.tune.trial import Trial
from flatout.wire.ratios import Ratio

_TIMING = (
    *("ratio", "ratio_low", "ratio_high", "pairs", "bare_step_ms", "plan_step_ms"),
    *("others_share", "quiet_share", "reference"),
)
"""The fields of ``Evidence`` that belong to the measurement of speed."""


def make_evidence(
    settings: Mapping[str, str],
    pairs: Pairs,
    verdict: Verdict,
    in_process: Mapping[str, Ratio | None],
) -> Evidence:
    """Make the evidence of a plan that is proven.

    Args:
        settings: the settings of the plan.
        pairs: the pairs of the bare program and the plan, at least two.
        verdict: the verdict on these pairs.
        in_process: for each knob, the ratio of its setting inside one process, see
            ``document.KnobResult.in_process``; ``None`` if this ratio was not measured.
    """
    ratio, quietness = pairs.ratio, pairs.quietness
    is_measurable = quietness.why_not_measurable is None
    bare, plan = pairs.costs
    is_by_seeds = any(loss.margin_source == "seeds" for loss in verdict.losses)
    return Evidence(
        settings=dict(settings),
        ratio=ratio.value,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        pairs=ratio.pairs if is_measurable else 0,
        bare_step_ms=bare.step_ms,
        plan_step_ms=plan.step_ms,
        steps=verdict.steps,
        seeds=pairs.count if is_by_seeds else 1,
        bare_repeats=verdict.bare_repeats is True,
        verdict=verdict.kind,
        in_process={name: r.value for name, r in in_process.items() if r is not None},
        losses=verdict.losses,
        checks=verdict.checks,
        reference=make_reference(pairs),
        others_share=quietness.taken_from_counted,
        quiet_share=quietness.blocks_share,
    )


def make_reference(pairs: Pairs) -> Reference:
    """Make the reference with which a later run with the plan is compared.

    Args:
        pairs: the pairs of the bare program and the plan, at least one.
    """
    plan = pairs.variant_runs[: pairs.count]
    work_us = [us for done in plan for us in done.process.fixed_work_us]
    return Reference(
        bare_median_ms=_median_step_ms(pairs.baseline_runs[: pairs.count]),
        plan_median_ms=_median_step_ms(plan),
        threads=plan[0].process.header.threads,
        fixed_work_us=today.low_quantile(work_us) if work_us else None,
    )


def _median_step_ms(runs: Sequence[Trial]) -> float:
    return median(step.step_ms for done in runs for step in done.process.steady_steps)


def merge(old: Evidence, new: Evidence, first_seed: int) -> tuple[Evidence, str]:
    """Merge the evidence of two proofs of the same settings.

    The new proof covers the old proof if it has at least as many steps and seeds, if it passed all
    checks that the old proof passed, and if it is conclusive or the old proof is inconclusive too.
    If so, the new proof replaces the old proof; otherwise both are stored. The measured speed is
    that of the proof with more pairs, or that of the new proof if both have the same number.

    Args:
        old: the evidence in the plan.
        new: the evidence of the proof that has just passed.
        first_seed: the first seed of the new proof.

    Returns the merged evidence, and how it was merged, as a clause that begins with "the new
    proof".
    """
    timed = old if old.pairs > new.pairs else new
    timing = {key: getattr(timed, key) for key in _TIMING}
    in_process = {**old.in_process, **new.in_process}
    added = Verified(new.steps, new.seeds, new.verdict, first_seed, _list_passed(new))
    further = tuple(one for one in old.verified if not _is_within(one, added))
    if _covers(new, old):
        evidence = dataclasses.replace(new, **timing, in_process=in_process, verified=further)
        return evidence, f"the new proof replaces the old one, which covers {_extent(old)}"
    verified = (*further, added)
    evidence = dataclasses.replace(old, **timing, in_process=in_process, verified=verified)
    return evidence, f"the new proof is stored beside the old one, which covers {_extent(old)}"


def _list_passed(evidence: Evidence) -> tuple[str, ...]:
    """Return the names of the checks that passed."""
    return tuple(dict.fromkeys(c.name for c in evidence.checks if c.result == "passed"))


def _covers(new: Evidence, old: Evidence) -> bool:
    return (
        new.steps >= old.steps
        and new.seeds >= old.seeds
        and (new.verdict != "inconclusive" or old.verdict == "inconclusive")
        and set(_list_passed(new)) >= set(_list_passed(old))
    )


def _is_within(one: Verified, other: Verified) -> bool:
    """Return whether the proof ``other`` has all seeds, steps and checks of the proof ``one``."""
    first, last = one.first_seed, one.first_seed + one.seeds
    return (
        other.first_seed <= first
        and last <= other.first_seed + other.seeds
        and one.steps <= other.steps
        and set(one.checks) <= set(other.checks)
    )


def _extent(evidence: Evidence) -> str:
    return f"{evidence.steps:,} steps and {evidence.seeds:,} seeds"
