"""Python, autograd and dispatch take more time than the kernels that they call."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding, why_not_compiled

OVERHEAD_MATTERS = 0.25
"""Smallest share that is reported: every model has some small operators."""


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
        evidence = [f"operators that take more than 20 us a call make up {large:.0%} of a step"]
    if share < OVERHEAD_MATTERS:
        return None
    why_not = why_not_compiled(case)
    return Finding(
        "overhead-bound",
        "Python and dispatch around small operators",
        [
            f"forward, loss and backward take {phases:.0%} of a step",
            *evidence,
            f"a step calls {calls:,.0f} operators",
        ],
        share,
        "edit: use larger batches, fewer and larger operators, or torch.compile(model)"
        if why_not is None
        else f"edit: use larger batches, or fewer and larger operators ({why_not})",
    )
