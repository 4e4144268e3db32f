"""The program computes in a dtype that is slow on this machine."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

WORTHWHILE = 1.3
"""The other dtype must be this many times as fast at matmuls; casts cost less than that."""


def find(case: Case) -> Finding | None:
    return _find_slow_half(case) or _find_slow_single(case)


def _find_slow_half(case: Case) -> Finding | None:
    """float16 without units for it is many times slower than float32 on a CPU; so is bfloat16."""
    rates = {dtype: rate for dtype, rate in case.matmul_flops_per_s.items() if rate}
    used = case.main_dtype
    if used not in ("float16", "bfloat16") or used not in rates:
        return None
    fastest = max(("float32", "bfloat16"), key=lambda dtype: rates.get(dtype, 0.0))
    if rates.get(fastest, 0.0) < WORTHWHILE * rates[used]:
        return None
    arithmetic = case.operators_share(lambda o: o.is_arithmetic)
    share = arithmetic * (1 - rates[used] / rates[fastest])
    if share < MATTERS:
        return None
    return Finding(
        "compute-bound-wrong-dtype",
        f"{used}, which is slow on this machine",
        [
            f"matmuls and convolutions, mostly in {used}, take {arithmetic:.0%} of a step",
            f"matmuls in {fastest} are {rates[fastest] / rates[used]:.2g} times as fast on this "
            "machine",
        ],
        share,
        "edit: torch.autocast(..., dtype=torch.bfloat16)"
        if fastest == "bfloat16"
        else f"edit: compute in float32, without {used}",
    )


def _find_slow_single(case: Case) -> Finding | None:
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
            f"matmuls and convolutions in float32 take {arithmetic:.0%} of a step",
            f"matmuls in bfloat16 are {half / single:.2g} times as fast on this machine",
        ],
        share,
        "knob: precision=bf16",
    )
