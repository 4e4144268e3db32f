"""Forward passes are computed again in backward, to save memory."""

from __future__ import annotations

from flatout.doctor.case import Case, PlacedOperator
from flatout.doctor.findings import MATTERS, Finding, describe_largest


def find(case: Case) -> Finding | None:
    def is_repeated(operator: PlacedOperator) -> bool:
        return operator.within == "recomputation"

    share = case.operators_share(is_repeated)
    if share < MATTERS:
        return None
    return Finding(
        "recomputation",
        "forward passes that are computed again in backward",
        [
            f"checkpoints compute operators again that take {share:.0%} of a step",
            *describe_largest(case, is_repeated),
        ],
        share,
        "edit: use torch.utils.checkpoint for fewer modules, as far as memory allows",
    )
