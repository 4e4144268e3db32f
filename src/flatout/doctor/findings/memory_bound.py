"""Elementwise operators, which move more than they compute."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

ELEMENTWISE = (
    *("add", "add_", "mul", "mul_", "div", "div_", "sub", "relu", "relu_", "gelu", "silu"),
    *("sigmoid", "tanh", "exp", "threshold_backward", "gelu_backward", "silu_backward"),
    *("native_batch_norm", "native_batch_norm_backward", "native_layer_norm"),
    *("native_layer_norm_backward", "_softmax", "_softmax_backward_data", "sum", "where"),
    *("fill_", "zero_", "clamp_min", "addcmul_", "addcdiv_", "lerp_", "sqrt"),
)
MEMORY_MATTERS = 0.25
"""Elementwise work is part of every model; a quarter of the step is worth fusing."""


def find(case: Case) -> Finding | None:
    names = {f"aten::{name}" for name in ELEMENTWISE}
    share = case.operators_share(lambda name: name in names)
    if share < MEMORY_MATTERS:
        return None
    top = [o for o in case.operators if o["name"] in names][:3]
    return Finding(
        "memory-bound",
        "elementwise operators, bound by memory",
        [f"{o['name']}: {o['calls']:.3g} calls, {o['self_ms']:.3g} ms a step" for o in top],
        share,
        "edit: torch.compile(model) fuses them",
    )
