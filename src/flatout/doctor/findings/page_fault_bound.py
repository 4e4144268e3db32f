"""Memory that is handed back and faulted in again at every step."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    faults = [step.minor_faults for step in case.steps if step.minor_faults is not None]
    cost_us = case.ceilings.page_fault_us if case.ceilings is not None else None
    if not faults or cost_us is None:
        return None
    per_step = sum(faults) / len(faults)
    share = min(1.0, per_step * cost_us / 1e3 / case.mean_step_ms)
    if share < MATTERS:
        return None
    return Finding(
        "page-fault-bound",
        "page faults",
        [
            f"{per_step:,.0f} minor page faults a step, {cost_us:.2g} us each on this machine",
        ],
        share,
        "edit: start with GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
        "glibc.malloc.trim_threshold=4294967296",
    )
