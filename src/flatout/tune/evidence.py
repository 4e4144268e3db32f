"""What becomes of a plan's evidence when the plan is proven once more. Pure functions.

Evidence is added to or replaced by stronger, and never by weaker.
"""

from __future__ import annotations

import dataclasses

from flatout.plan import Evidence, Verified


def merged(old: Evidence, new: Evidence, first_seed: int) -> tuple[Evidence, str]:
    """The evidence of both proofs of the same settings, and what was done, one clause.

    A proof takes the place of another that it covers: as many steps and seeds, all the checks that
    passed, and a loss that has fallen if it had. Otherwise the other one stays, with the new one
    beside it. The ratio with more pairs behind it is kept.

    Args:
        old: of the plan.
        new: of the proof that has just passed.
        first_seed: of the new one.
    """
    timed = old if old.pairs > new.pairs else new
    figures = {
        key: getattr(timed, key)
        for key in ("ratio", "ratio_low", "ratio_high", "pairs", "bare_step_ms", "plan_step_ms")
    }
    in_process = {**old.in_process, **new.in_process}
    added = Verified(new.steps, new.seeds, new.verdict, first_seed, _passed(new))
    if _covers(new, old):
        further = tuple(one for one in old.verified if not _is_within(one, added))
        made = dataclasses.replace(new, **figures, in_process=in_process, verified=further)
        return made, f"in the place of its proof over {_extent(old)}, which it covers"
    further = tuple(one for one in old.verified if not _is_within(one, added))
    made = dataclasses.replace(old, **figures, in_process=in_process, verified=(*further, added))
    return made, f"beside its proof over {_extent(old)}, which stays"


def _passed(evidence: Evidence) -> tuple[str, ...]:
    return tuple(dict.fromkeys(c.name for c in evidence.checks if c.result == "passed"))


def _covers(new: Evidence, old: Evidence) -> bool:
    return (
        new.steps >= old.steps
        and new.seeds >= old.seeds
        and (new.verdict != "inconclusive" or old.verdict == "inconclusive")
        and set(_passed(new)) >= set(_passed(old))
    )


def _is_within(one: Verified, other: Verified) -> bool:
    """Whether the seeds and steps of one are among those of the other, with all its checks."""
    first, last = one.first_seed, one.first_seed + one.seeds
    return (
        other.first_seed <= first
        and last <= other.first_seed + other.seeds
        and one.steps <= other.steps
        and set(one.checks) <= set(other.checks)
    )


def _extent(evidence: Evidence) -> str:
    return f"{evidence.steps:,} steps and {evidence.seeds:,} seeds"
