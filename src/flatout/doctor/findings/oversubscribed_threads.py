"""The program computes with more threads than it has cores."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

_COMPUTING = ("forward", "loss", "backward", "optimizer")


def find(case: Case) -> Finding | None:
    threads = case.process.threads
    if threads is None or case.usable_cores is None or case.on_accelerator:
        return None
    own = case.process.shared_work
    ranks = int(case.process.header.environment.get("LOCAL_WORLD_SIZE") or 1)
    if own is not None:
        ranks = own.ranks
    number = max(ranks, case.processes)
    cores = max(1.0, case.usable_cores)
    if threads * number <= cores or (threads == 1 and own is None):
        return None
    who = f"torch computes with {threads} threads"
    if number > 1:
        name = "ranks" if ranks > 1 else "processes of this program"
        who = f"{number} {name} compute with {threads} threads each"
    return Finding(
        "oversubscribed-threads",
        "more threads than cores",
        [f"{who} on {case.usable_cores:g} cores"],
        # While all compute, each thread waits for a core for this share of the time.
        (1 - cores / (threads * number)) * case.phase_share(*_COMPUTING),
        _remedy(number, cores, own is not None),
    )


def _remedy(ranks: int, cores: float, are_flatouts: bool) -> str:
    if are_flatouts and ranks > cores:
        return f"edit: run at most {int(cores)} --ranks"
    if are_flatouts:
        number = int(cores / ranks)
        return f"edit: let each of the --ranks compute with {number} thread{'s' * (number > 1)}"
    return (
        f"edit: start with OMP_NUM_THREADS={max(1, int(cores / ranks))}"
        + " (knob: threads=all)" * (ranks == 1)
    )
