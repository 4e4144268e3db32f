"""An optimizer that goes over its parameters one by one."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    share = case.phase_share("optimizer")
    if share is None or share < MATTERS:
        return None
    plain = [o for o in case.facts.get("optimizers", []) if o["can_fuse"] and not o["fused"]]
    if not plain:
        return None
    return Finding(
        "unfused-optimizer",
        "an optimizer without its fused kernel",
        [
            f"{o['class']} steps over {o['tensors']} tensors, {o['elements']:,} elements, in "
            "separate passes"
            for o in plain
        ],
        share,
        "knob: optimizer=fused (by hand: fused=True)",
    )
