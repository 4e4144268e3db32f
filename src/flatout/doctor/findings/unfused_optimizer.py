"""The optimizer updates its parameters one by one."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

ONE_PASS = ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam")
"""Optimizers for which the knob has a fused step, and torch has none on any device."""


def find(case: Case) -> Finding | None:
    if "optimizer" in case.facts.knobs:
        return None  # it steps otherwise than its options say
    share = case.phase_share("optimizer")
    plain = [
        o
        for o in case.facts.optimizers or ()
        if not o.fused and (o.can_fuse or (o.class_ in ONE_PASS and not case.on_accelerator))
    ]
    if share < MATTERS or not plain:
        return None
    return Finding(
        "unfused-optimizer",
        "an optimizer that updates its parameters one by one",
        [f"its steps take {case.phases_ms['optimizer']:.3g} ms"]
        + [
            f"{o.class_} goes over {o.tensors} tensors, {o.elements:,} elements, in "
            "separate operators"
            for o in plain
        ],
        share,
        "edit: build the optimizer with fused=True"
        if case.on_accelerator
        else "knob: optimizer=onepass (by hand: flatout.optim, or fused=True)",
    )
