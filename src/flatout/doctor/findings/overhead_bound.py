"""Calls cost more than what they compute: Python, autograd and dispatch."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

OVERHEAD_MATTERS = 0.25
"""Any model has small operators between the large ones, and a good kernel does not remove them."""


def find(case: Case) -> Finding | None:
    calls = case.profile.operators_total_calls
    if not calls or not case.operators:
        return None
    phases = case.phase_share("forward", "loss", "backward")
    if case.device_share is not None:
        share = case.host_share("forward", "loss", "backward")
        evidence = [f"the accelerator is busy for {case.device_share:.0%} of a step"]
    else:
        large = case.operators_share(lambda o: o.is_large and o.phase != "optimizer")
        share = phases - large
        evidence = [f"operators of more than 20 us a call take {large:.0%} of a step"]
    if share < OVERHEAD_MATTERS:
        return None
    return Finding(
        "overhead-bound",
        "Python and dispatch around small operators",
        [
            f"forward, loss and backward take {phases:.0%} of a step",
            *evidence,
            f"{calls:,.0f} operators are called in a step",
        ],
        share,
        "edit: larger batches, fewer and larger operators, or torch.compile(model)",
    )
