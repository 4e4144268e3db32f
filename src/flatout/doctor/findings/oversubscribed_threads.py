"""The program computes with more threads than it has cores."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding


def find(case: Case) -> Finding | None:
    threads = case.process.threads
    if threads is None or case.usable_cores is None or case.on_accelerator:
        return None
    ranks = int(case.process.header.environment.get("LOCAL_WORLD_SIZE") or 1)
    cores = max(1.0, case.usable_cores)
    if threads * ranks <= cores or threads == 1:
        return None
    who = (
        f"{ranks} ranks compute with {threads} threads each"
        if ranks > 1
        else (f"torch computes with {threads} threads")
    )
    return Finding(
        "oversubscribed-threads",
        "more threads than cores",
        [f"{who} on {case.usable_cores:g} cores"],
        None,
        f"edit: start with OMP_NUM_THREADS={max(1, int(cores / ranks))}"
        + " (knob: threads=all)" * (ranks == 1),
    )
