"""The fast path of torch's transformer layers has a slow masked softmax on a CPU."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding, describe_largest

OPERATOR = "aten::_masked_softmax"


def find(case: Case) -> Finding | None:
    share = case.operators_share(lambda o: o.name == OPERATOR)
    if case.on_accelerator or share < MATTERS:
        return None
    return Finding(
        "padded-fast-path",
        "a padding mask in the fast path of torch's transformer layers",
        describe_largest(case, lambda o: o.name == OPERATOR),
        share,
        "knob: fastpath=off (uses scaled_dot_product_attention)",
    )
