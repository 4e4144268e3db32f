"""Elementwise operators move more data than they compute with."""

from __future__ import annotations

from flatout.doctor.case import Case, PlacedOperator
from flatout.doctor.findings import Finding, describe_largest, why_not_compiled

_NAMES = (
    *("add", "add_", "mul", "mul_", "div", "div_", "sub", "sub_", "neg", "pow", "rsqrt", "sqrt"),
    *("relu", "relu_", "gelu", "silu", "sigmoid", "tanh", "exp", "clamp_min", "clamp_min_"),
    *("threshold_backward", "gelu_backward", "silu_backward", "sigmoid_backward", "tanh_backward"),
    *("native_batch_norm", "native_batch_norm_backward", "native_layer_norm", "leaky_relu_"),
    *(
        "native_layer_norm_backward",
        "native_group_norm",
        "native_group_norm_backward",
        "leaky_relu",
    ),
    *("_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data", "sum"),
    *(
        "leaky_relu",
        "leaky_relu_backward",
        "where",
        "fill_",
        "zero_",
        "masked_fill",
        "masked_fill_",
        "mean",
    ),
)
ELEMENTWISE = frozenset(f"aten::{name}" for name in _NAMES)

MEMORY_MATTERS = 0.25
"""Smallest share that is worth fusing: every model has some elementwise work."""


def find(case: Case) -> Finding | None:
    def moves(operator: PlacedOperator) -> bool:
        return operator.name in ELEMENTWISE and operator.is_large and operator.phase != "optimizer"

    # page_fault_bound reports the time of page faults, which elementwise operators cause as well.
    share = case.operators_share(moves) - (case.page_fault_share or 0.0)
    if share < MEMORY_MATTERS:
        return None
    why_not = why_not_compiled(case)
    return Finding(
        "memory-bound",
        "elementwise operators limited by memory bandwidth",
        describe_largest(case, moves),
        share,
        "edit: use torch.compile(model), which fuses them"
        if why_not is None
        else f"edit: use fewer of them ({why_not})",
    )
