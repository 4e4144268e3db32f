"""Operators so small that calling them costs more than computing."""

from __future__ import annotations

from flatout.doctor.case import COMPUTE_PHASES, Case
from flatout.doctor.findings import MATTERS, Finding

SMALL_US = 15.0
"""Mean time of an operator below which its dispatch (Python, autograd, dispatcher: some 5 to 10 us
a call) is the larger part."""


def find(case: Case) -> Finding | None:
    calls = case.profile.get("operators_total_calls")
    total_ms = case.profile.get("operators_total_ms")
    compute = sum(case.phase_share(phase) or 0.0 for phase in COMPUTE_PHASES)
    if not calls or not total_ms or total_ms / calls * 1e3 > SMALL_US or compute < MATTERS:
        return None
    return Finding(
        "dispatch-overhead",
        "many small operators",
        [f"{calls:,.0f} operators a step, {total_ms / calls * 1e3:.2g} us each"],
        compute,
        "edit: larger batches, or torch.compile(model)",
    )
