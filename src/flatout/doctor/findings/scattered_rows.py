"""Rows are gathered by index and added up by index, as in graph networks."""

from __future__ import annotations

from flatout.doctor.case import Case, PlacedOperator
from flatout.doctor.findings import Finding, describe_largest

_WRITES = (
    *("scatter_add_", "scatter_add", "scatter_reduce_", "scatter_reduce", "index_add_"),
    *("index_add", "_index_put_impl_", "index_reduce_"),
)
_READS = ("index", "index_select", "gather")
WRITES = frozenset(f"aten::{name}" for name in _WRITES)
SCATTERED = WRITES | {f"aten::{name}" for name in _READS}

SCATTER_MATTERS = 0.1
"""Smallest share of the writes that is reported: many programs index something."""


def find(case: Case) -> Finding | None:
    def is_scattered(operator: PlacedOperator) -> bool:
        return operator.name in SCATTERED

    if case.operators_share(lambda o: o.name in WRITES) < SCATTER_MATTERS:
        return None
    return Finding(
        "scattered-rows",
        "rows that are gathered and added up by index",
        describe_largest(case, is_scattered),
        case.operators_share(is_scattered),
        "edit: if the indices stay the same, multiply with a sparse matrix in CSR format instead "
        "(torch.sparse_csr_tensor), which gathers and adds up in one pass",
    )
