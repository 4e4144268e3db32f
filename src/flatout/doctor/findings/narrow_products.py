"""MKL uses AVX2 for matmuls on a processor that has AVX-512."""

from __future__ import annotations

from flatout import machine
from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding, describe_largest
from flatout.knobs import mkl


def find(case: Case) -> Finding | None:
    share = mkl.SAVED * case.operators_share(lambda o: mkl.is_product(o.name))
    if (
        case.on_accelerator
        or share < MATTERS
        or case.ceilings is None
        or "cpu" not in case.ceilings.fingerprint
        or machine.cpu_vendor() in (None, "GenuineIntel")
        or not machine.has_cpu_flags(mkl.FLAGS)
        or case.main_dtype not in ("float32", "float64")
        or mkl.is_preloaded_in(case.process.header.environment)
    ):
        return None
    return Finding(
        "narrow-products",
        "matmuls without AVX-512, which MKL uses on Intel processors only",
        [
            f"this processor, {case.ceilings.fingerprint['cpu']}, has it",
            *describe_largest(case, lambda o: mkl.is_product(o.name)),
        ],
        share,
        "knob: mkl=avx512",
    )
