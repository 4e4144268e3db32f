"""Attention without a fused kernel writes its matrix of scores to memory."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding
from flatout.doctor.findings.slow_random_numbers import RANDOM_OPERATORS


def find(case: Case) -> Finding | None:
    inside = [o for o in case.operators if o.within == "attention"]
    random = [o for o in inside if o.name in RANDOM_OPERATORS]
    # On a CPU the random numbers are a finding of their own.
    share = sum(o.share for o in inside if case.on_accelerator or o not in random)
    if share < MATTERS:
        return None
    evidence = ["scaled_dot_product_attention uses its unfused path, which stores the score matrix"]
    if random and not case.on_accelerator:
        evidence.append("its calls have dropout, for which torch has no fused CPU kernel")
    return Finding(
        "attention-off-flash",
        "attention without a fused kernel",
        evidence,
        share,
        "knob: attention=fast (one pass, with dropout)"
        if random and not case.on_accelerator
        else "edit: masks, shapes and dtypes that a fused kernel takes (is_causal=True, no "
        "gradient for the mask)",
    )
