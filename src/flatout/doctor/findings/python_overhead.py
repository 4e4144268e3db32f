"""Python between the phases: logging, batching by hand, metrics."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

PYTHON_MATTERS = 0.1
"""The gaps between phases hold the loop itself, zero_grad and clipping, which no one can avoid."""


def find(case: Case) -> Finding | None:
    share = case.phase_share("other")
    if share is None or share < PYTHON_MATTERS:
        return None
    by_hand = " (the update by hand among it)" if case.phases_ms["optimizer"] is None else ""
    return Finding(
        "python-overhead",
        "Python between the phases",
        [f"{case.phases_ms['other']:.3g} ms of a step are in none of the phases{by_hand}"],
        share,
        "edit: move work out of the loop, or do it every nth step",
    )
