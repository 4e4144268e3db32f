"""Arithmetic in a dtype that this machine is slow at."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

WORTHWHILE = 1.3
"""How much faster the other dtype's matrix products must be: casts eat up less than that."""


def find(case: Case) -> Finding | None:
    precision = case.facts.switches.float32_matmul_precision or "highest"
    if case.main_dtype != "float32" or precision != "highest":
        return None
    rates = case.matmul_flops_per_s
    single, half = rates.get("float32"), rates.get("bfloat16")
    if not single or not half or half < WORTHWHILE * single:
        return None
    arithmetic = case.operators_share(lambda o: o.is_arithmetic)
    share = arithmetic * (1 - single / half)
    if share < MATTERS:
        return None
    return Finding(
        "compute-bound-wrong-dtype",
        "float32 where bfloat16 is faster",
        [
            f"matrix products and convolutions take {arithmetic:.0%} of a step, in float32",
            f"this machine does {half / single:.2g} times as many operations in bfloat16",
        ],
        share,
        "knob: precision=bf16",
    )
