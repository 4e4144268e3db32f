"""Ranks of a distributed job wait for each other."""

from __future__ import annotations

from flatout.doctor.case import Case, PlacedOperator
from flatout.doctor.findings import MATTERS, Finding, describe_largest

COMMUNICATION = ("gloo:", "nccl:", "c10d::", "mpi:", "xccl:", "ucc:")


def find(case: Case) -> Finding | None:
    def communicates(operator: PlacedOperator) -> bool:
        return operator.name.startswith(COMMUNICATION)

    share = case.operators_share(communicates)
    if case.device_share is not None:  # what other kernels hide costs nothing
        others = sum(o.share for o in case.operators if not communicates(o))
        share = max(0.0, min(share, 1.0 - others))
    if share < MATTERS:
        return None
    return Finding(
        "idle-in-communication",
        "communication between ranks",
        describe_largest(case, communicates),
        share,
        "edit: use larger batches per rank, accumulate gradients over several (no_sync()), or use "
        "DistributedDataParallel(gradient_as_bucket_view=True)",
    )
