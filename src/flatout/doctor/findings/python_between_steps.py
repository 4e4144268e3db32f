"""Python code outside of the phases takes time: logging, metrics, batches made by hand."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding
from flatout.doctor.ranks import PROGRAM

PYTHON_MATTERS = 0.1
"""Smallest share that is reported: the loop itself, zero_grad and clipping are part of it."""


def find(case: Case) -> Finding | None:
    share = case.host_share("other") - _operators_share(case)
    of_rank_0 = None if case.ranks is None else case.ranks.times[0]
    if of_rank_0 is not None:  # exchanges between ranks belong to no phase either
        share = min(share, of_rank_0.share(PROGRAM))
    if share < PYTHON_MATTERS:
        return None
    evidence = [f"{case.phases_ms['other']:.3g} ms of a step belong to none of its phases"]
    if case.process.trains and case.phases_ms["optimizer"] is None:
        evidence.append(
            "this includes the update of the parameters, as the program uses no optimizer object"
        )
    if case.phases_ms["data"] is None:
        evidence.append("this includes making the batch, as the program uses no DataLoader")
    return Finding(
        "python-between-steps",
        "Python between the phases",
        evidence,
        share,
        "edit: move work out of the loop, or do it only every nth step",
    )


def _operators_share(case: Case) -> float:
    """Return the share of a step in operators that no phase contains, such as those of a scripted
    module: they are not Python. On an accelerator, the time that the host spends on them counts as
    Python's."""
    if case.on_accelerator:
        return 0.0
    share = case.operators_share(lambda o: o.phase is None)
    return max(0.0, share - case.phase_share("data", "transfer", "forward", "loss"))
