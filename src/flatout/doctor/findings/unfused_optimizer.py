"""The optimizer updates its parameters one by one."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding
from flatout.wire.facts import OptimizerFacts

ONE_PASS = ("RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam")
"""Optimizers for which the knob has a fused step, and torch has none on any device."""


def can_step_faster(case: Case, optimizer: OptimizerFacts) -> bool:
    """Whether an optimizer that is not fused has a fused step, by torch or by the knob."""
    has_own_step = optimizer.class_ in ONE_PASS and not case.on_accelerator
    return optimizer.can_fuse or has_own_step


def find(case: Case) -> Finding | None:
    if "optimizer" in case.facts.knobs:
        return None  # it steps otherwise than its options say
    share = case.phase_share("optimizer")
    plain = [o for o in case.facts.optimizers or () if not o.fused and can_step_faster(case, o)]
    others = {o.class_ for o in case.facts.optimizers or ()} - {o.class_ for o in plain}
    in_step = case.operators_share(lambda o: o.phase == "optimizer")
    in_others = case.operators_share(lambda o: o.phase == "optimizer" and o.within in others)
    if in_step:
        share *= 1 - in_others / in_step
    if share < MATTERS or not plain:
        return None
    return Finding(
        "unfused-optimizer",
        "an optimizer that updates its parameters one by one",
        [f"its steps take {share * case.mean_step_ms:.3g} ms"]
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
