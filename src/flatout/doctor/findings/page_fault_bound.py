"""Memory that is handed back and faulted in again at every step."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

MANY_FAULTS = 256
"""Minor faults of a step (1 MiB of memory) below which they cannot matter."""


def find(case: Case) -> Finding | None:
    faults = case.minor_faults_per_step
    if faults is None or faults < MANY_FAULTS:
        return None
    # Threads that compute together fault together, so the step waits for this thread's part.
    all_threads = case.profile.get("minor_faults")
    part = case.profile["minor_faults_of_thread"] / all_threads if all_threads else 1.0
    cost_us = case.ceilings.page_fault_us if case.ceilings is not None else None
    evidence = [f"{faults:,.0f} minor page faults a step, {part:.0%} of them in the main thread"]
    share = None
    if cost_us is not None:
        share = min(1.0, faults * part * cost_us / 1e3 / case.mean_step_ms)
        if share < MATTERS:
            return None
        evidence.append(f"one costs {cost_us:.2g} us on this machine")
    return Finding(
        "page-fault-bound",
        "page faults",
        evidence,
        share,
        "edit: start with GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:"
        "glibc.malloc.trim_threshold=4294967296",
    )
