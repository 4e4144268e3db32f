"""An optimizer that goes over its parameters one by one."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    share = case.phase_share("optimizer")
    plain = [o for o in case.facts.get("optimizers", []) if o["can_fuse"] and not o["fused"]]
    if share < MATTERS or not plain:
        return None
    return Finding(
        "unfused-optimizer",
        "an optimizer without its fused kernel",
        [f"its steps take {case.phases_ms['optimizer']:.3g} ms"]
        + [
            f"{o['class']} goes over {o['tensors']} tensors, {o['elements']:,} elements, in "
            "separate operators"
            for o in plain
        ],
        share,
        "edit: fused=True where the optimizer is built"
        if case.on_accelerator
        else "knob: optimizer=fused (by hand: fused=True)",
    )
