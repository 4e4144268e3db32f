"""Cross entropy over many classes stores a probability for each class."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding, describe_largest
from flatout.knobs.cross_entropy import OPERATORS


def find(case: Case) -> Finding | None:
    def is_part(operator: object) -> bool:
        return any(name in str(operator) for name in OPERATORS)

    share = case.operators_share(lambda o: is_part(o.name))
    if case.on_accelerator or share < MATTERS:
        return None
    return Finding(
        "stored-probabilities",
        "cross entropy that stores a probability for each class",
        describe_largest(case, lambda o: is_part(o.name)),
        share,
        "knob: cross_entropy=fused (computes loss and gradient in one pass)",
    )
