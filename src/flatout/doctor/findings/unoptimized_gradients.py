"""Parameters that no optimizer has get gradients."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding


def find(case: Case) -> Finding | None:
    parameters = case.facts.parameters
    unoptimized = parameters.unoptimized_elements
    if not unoptimized or not case.facts.optimizers:
        return None  # a program that updates by hand has its own use for them
    total = sum(parameters.elements_by_dtype.values())
    return Finding(
        "unoptimized-gradients",
        "gradients that no optimizer uses",
        [
            f"{unoptimized:,} of {total:,} elements of parameters get a gradient and belong to no "
            "optimizer"
        ],
        None,
        "edit: give these parameters to an optimizer if they should be trained; if not, call "
        "requires_grad_(False) on them before the forward pass",
    )
