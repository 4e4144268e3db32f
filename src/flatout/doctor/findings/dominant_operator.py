"""One operator takes much of a step, and no other finding speaks of it."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding, compute_bound_wrong_dtype
from flatout.doctor.findings.memory_bound import ELEMENTWISE
from flatout.doctor.findings.scattered_rows import SCATTERED
from flatout.doctor.findings.slow_random_numbers import RANDOM_OPERATORS

DOMINANT_SHARE = 0.25


def find(case: Case) -> Finding | None:
    of_others = ELEMENTWISE | SCATTERED | RANDOM_OPERATORS
    operator = next(iter(case.operators_by_name), None)
    if operator is None or operator.share < DOMINANT_SHARE or operator.name in of_others:
        return None
    if operator.is_arithmetic and compute_bound_wrong_dtype.find(case) is not None:
        return None
    remedy = "edit: call it less often, or on smaller tensors"
    if operator.is_arithmetic:
        remedy = "edit: a smaller model; it is the arithmetic of this one"
    return Finding(
        "dominant-operator",
        "the largest operator, of which nothing else is known",
        [f"{operator.name}: {operator.calls:.3g} calls, {operator.share:.0%} of a step"],
        None,
        remedy,
    )
