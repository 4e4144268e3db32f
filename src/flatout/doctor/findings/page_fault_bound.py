"""Every step returns memory to the system and faults it in again."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding
from flatout.knobs.allocator import TUNABLES
from flatout.wire.profile import MANY_FAULTS


def find(case: Case) -> Finding | None:
    faults = case.minor_faults_per_step
    if faults is None or faults < MANY_FAULTS:
        return None
    share = case.page_fault_share
    if share is not None and share < MATTERS:
        return None
    evidence = [
        f"a step has {faults:,.0f} minor page faults, {case.main_thread_faults:.0%} of them in the "
        "main thread"
    ]
    if case.page_fault_us is not None:
        evidence.append(f"one page fault takes {case.page_fault_us:.2g} us here")
    return Finding(
        "page-fault-bound",
        "page faults",
        evidence,
        share,
        f"knob: allocator=keep (by hand: start with GLIBC_TUNABLES={TUNABLES['keep']})",
    )
