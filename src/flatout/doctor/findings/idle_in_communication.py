"""Waiting for other ranks."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

COMMUNICATION = ("gloo:", "nccl:", "c10d::", "mpi:", "xccl:", "ucc:")


def find(case: Case) -> Finding | None:
    def communicates(name: str) -> bool:
        return name.startswith(COMMUNICATION)

    share = case.operators_share(communicates)
    if share < MATTERS:
        return None
    return Finding(
        "idle-in-communication",
        "communication between ranks",
        [
            f"{o['name']}: {o['calls']:.3g} a step, {o['self_ms']:.3g} ms"
            for o in case.operators
            if communicates(o["name"])
        ][:3],
        share,
        "edit: larger batches a rank, or gradient_as_bucket_view=True",
    )
