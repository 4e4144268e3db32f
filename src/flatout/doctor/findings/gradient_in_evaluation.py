"""Autograd records passes that no backward call follows."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    process = case.process
    recorded = [step for step in process.evaluations if step.grad]
    if not recorded:
        return None
    recorded_ms = sum(step.step_ms for step in recorded)
    total_ms = sum(step.step_ms for step in process.steps + process.evaluations)
    share = recorded_ms / total_ms
    if share < MATTERS:
        return None
    return Finding(
        "gradient-in-evaluation",
        "gradients recorded in evaluation",
        [
            f"{len(recorded)} passes forward without a backward call were recorded by autograd",
            f"they are {share:.0%} of the time of all passes",
        ],
        share,
        "edit: put the evaluation under torch.no_grad() or torch.inference_mode()",
    )
