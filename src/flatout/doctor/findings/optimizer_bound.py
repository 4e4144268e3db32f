"""Much of a step goes to an optimizer for which there is no faster step."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding
from flatout.doctor.findings.unfused_optimizer import can_step_faster

OPTIMIZER_MATTERS = 0.15
"""Smallest share that is reported: every training has an optimizer."""


def find(case: Case) -> Finding | None:
    slow = [o for o in case.facts.optimizers or () if not o.fused and not can_step_faster(case, o)]
    classes = {o.class_ for o in slow}
    in_step = case.operators_share(lambda o: o.phase == "optimizer")
    in_slow = case.operators_share(lambda o: o.phase == "optimizer" and o.within in classes)
    if "optimizer" in case.facts.knobs or not in_slow:
        return None
    share = case.phase_share("optimizer") * in_slow / in_step
    if share < OPTIMIZER_MATTERS:
        return None
    return Finding(
        "optimizer-bound",
        "an optimizer that has no fused step",
        [
            f"the steps of {o.class_} go over {o.tensors} tensors, {o.elements:,} elements"
            for o in slow
        ],
        share,
        "edit: step less often (accumulate gradients over several batches), or with an optimizer "
        "that has a fused step",
    )
