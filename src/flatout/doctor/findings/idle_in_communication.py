"""Ranks of a distributed job, or of ``--ranks``, wait for each other."""

from __future__ import annotations

from flatout.doctor.case import Case, PlacedOperator
from flatout.doctor.findings import MATTERS, Finding, describe_largest
from flatout.doctor.ranks import COMMUNICATION, WAITING, Ranks

OPERATORS = ("gloo:", "nccl:", "c10d::", "mpi:", "xccl:", "ucc:")


def find(case: Case) -> Finding | None:
    return _find_in_operators(case) if case.ranks is None else _find_in_ranks(case.ranks)


def _find_in_ranks(ranks: Ranks) -> Finding | None:
    """The share of rank 0, whose step is that of the program."""
    first = ranks.times[0]
    if first is None:
        return None
    share = first.share(WAITING, COMMUNICATION)
    if share < MATTERS:
        return None
    evidence = [
        f"rank {times.rank}: {times.share(COMMUNICATION):.0%} of a step in communication, "
        f"{times.share(WAITING):.0%} waiting for the slowest rank"
        for times in ranks.times
        if times is not None
    ]
    if ranks.bound is not None:
        evidence.append(
            f"what every rank does alike limits {ranks.size} ranks to {ranks.bound:.1f}x"
        )
    return Finding(
        "idle-in-communication",
        "communication between ranks",
        evidence,
        share,
        "edit: use larger batches, so that a rank computes longer between two exchanges; or run "
        "fewer --ranks",
    )


def _find_in_operators(case: Case) -> Finding | None:
    def communicates(operator: PlacedOperator) -> bool:
        return operator.name.startswith(OPERATORS)

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
