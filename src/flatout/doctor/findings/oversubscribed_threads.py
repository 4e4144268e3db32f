"""More threads than cores."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding


def find(case: Case) -> Finding | None:
    threads = case.process.header.get("threads")
    if threads is None or case.usable_cores is None or case.on_accelerator:
        return None
    if threads <= max(1.0, case.usable_cores):
        return None
    return Finding(
        "oversubscribed-threads",
        "more threads than cores",
        [f"torch computes with {threads} threads on {case.usable_cores:g} cores"],
        None,
        f"edit: start with OMP_NUM_THREADS={max(1, int(case.usable_cores))}",
    )
