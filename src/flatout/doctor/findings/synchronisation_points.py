"""The host waits for the device."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding, describe_largest

WAITS = frozenset(
    {
        *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"),
        *("hipStreamSynchronize", "hipDeviceSynchronize"),
    }
)


def find(case: Case) -> Finding | None:
    if not case.on_accelerator or case.device_share is None:
        return None  # on a CPU reading a value costs next to nothing
    waits = sum(o.host_share for o in case.operators if o.name in WAITS)
    # A wait can cost no more than the device is idle: the rest of it is work being done.
    share = min(waits, 1.0 - case.device_share)
    if share < MATTERS:
        return None
    return Finding(
        "synchronisation-points",
        "the host waits for the device",
        describe_largest(case, lambda o: o.name in WAITS),
        share,
        "edit: read losses and metrics (.item(), .cpu(), print) only every nth step",
    )
