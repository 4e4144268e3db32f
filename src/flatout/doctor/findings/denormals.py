"""Denormal numbers slow the processor down."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

DENORMAL_SHARE = 0.01
"""Share of denormal parameters above which kernels were seen to slow down
(pytorch/pytorch#19651, #23862)."""


def find(case: Case) -> Finding | None:
    denormal = case.facts.parameters.denormal_share
    if case.on_accelerator or denormal is None or denormal < DENORMAL_SHARE:
        return None
    return Finding(
        "denormals",
        "denormal numbers",
        [f"{denormal:.1%} of the parameters are smaller than float32's smallest normal number"],
        None,
        "knob: denormals=flush (by hand: torch.set_flush_denormal(True) at the start)",
    )
