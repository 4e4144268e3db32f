"""Arithmetic in a dtype that this machine is slow at."""

from __future__ import annotations

from flatout.doctor.case import CONVOLUTION_OPERATORS, MATMUL_OPERATORS, Case
from flatout.doctor.findings import MATTERS, Finding

WORTHWHILE = 1.3
"""How much faster the other dtype's matrix products must be: casts eat up less than that."""


def find(case: Case) -> Finding | None:
    if case.ceilings is None or case.main_dtype != "float32":
        return None
    rates = case.ceilings.matmul_flops_per_s
    single, half = rates.get("float32"), rates.get("bfloat16")
    if not single or not half or half < WORTHWHILE * single:
        return None
    arithmetic = case.operators_share(
        lambda name: name in MATMUL_OPERATORS or name in CONVOLUTION_OPERATORS
    )
    share = arithmetic * (1 - single / half)
    if share < MATTERS:
        return None
    return Finding(
        "wrong-dtype",
        "float32 where bfloat16 is faster",
        [
            f"matrix products and convolutions are {arithmetic:.0%} of a step, in float32",
            f"this machine does {half / single:.2g} times as many operations in bfloat16",
        ],
        share,
        "knob: precision=bf16",
    )
