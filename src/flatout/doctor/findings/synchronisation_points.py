"""The host waits for the device."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "hipStreamSynchronize")


def find(case: Case) -> Finding | None:
    if not case.on_accelerator:
        return None  # on a CPU reading a value costs next to nothing
    waits = [o for o in case.operators if o["name"] in WAITS]
    share = sum(o["share"] for o in waits)
    if share < MATTERS:
        return None
    return Finding(
        "synchronisation-points",
        "the host waits for the device",
        [f"{o['name']}: {o['calls']:.3g} a step, {o['self_ms']:.3g} ms" for o in waits],
        share,
        "edit: read losses and metrics (.item(), .cpu(), print) every nth step",
    )
