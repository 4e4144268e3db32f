"""Python outside of the phases: logging, metrics, batches made by hand."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

PYTHON_MATTERS = 0.1
"""The gaps between phases hold the loop itself, zero_grad and clipping, which no one can avoid."""


def find(case: Case) -> Finding | None:
    share = case.host_share("other")
    if share < PYTHON_MATTERS:
        return None
    evidence = [f"{case.phases_ms['other']:.3g} ms of a step are in none of its phases"]
    if case.process.trains and case.phases_ms["optimizer"] is None:
        evidence.append("no optimizer object steps: an update by hand is among them")
    if case.phases_ms["data"] is None:
        evidence.append("no DataLoader is used: making the batch is among them")
    return Finding(
        "python-between-steps",
        "Python between the phases",
        evidence,
        share,
        "edit: move work out of the loop, or do it every nth step",
    )
