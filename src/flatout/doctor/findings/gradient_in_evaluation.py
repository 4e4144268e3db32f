"""Autograd records forward passes that no backward call follows."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    if case.process.trains:
        passes = case.evaluations
        total_ms = sum(turn.step_ms for turn in [*case.steps, *case.evaluations])
    else:
        passes = case.steps
        total_ms = sum(turn.step_ms for turn in passes)
    recorded = [turn for turn in passes if turn.grad]
    share = sum(turn.phases_ms["forward"] or 0.0 for turn in recorded) / total_ms
    if share < MATTERS:
        return None
    return Finding(
        "gradient-in-evaluation",
        "gradients recorded in evaluation",
        [
            f"autograd recorded {len(recorded)} of {len(passes)} forward passes that no backward "
            "call followed",
            f"these forward passes take {share:.0%} of the time of all passes",
        ],
        share,
        "edit: run the evaluation under torch.inference_mode() or torch.no_grad(); or, if nothing "
        "is trained through it, knob: evaluation=no_grad",
    )
