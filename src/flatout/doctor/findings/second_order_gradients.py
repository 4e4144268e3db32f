"""Backward passes are recorded, and have backward passes of their own: gradient penalties, physics
losses, meta-learning."""

from __future__ import annotations

from flatout.doctor.case import Case, PlacedOperator
from flatout.doctor.findings import MATTERS, Finding, describe_largest


def find(case: Case) -> Finding | None:
    def is_second_order(operator: PlacedOperator) -> bool:
        return operator.within == "second_order"

    share = case.operators_share(is_second_order)
    if share < MATTERS:
        return None
    return Finding(
        "second-order-gradients",
        "gradients of gradients",
        [
            "backward passes with create_graph=True, and the backward of what they record, take "
            f"{share:.0%} of a step",
            *describe_largest(case, is_second_order),
        ],
        share,
        # Lazy regularization: Karras et al. 2020, "Analyzing and Improving the Image Quality of
        # StyleGAN", section 3.1.
        "edit: compute the terms of the loss that need them in every few steps only, or on a part "
        "of the batch; torch.compile cannot record them",
    )
