"""Walking the autograd graph of a backward call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge


def edges(outputs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield all edges that a backward call from ``outputs`` follows.

    Each edge is a pair of a node and the node from which it is reached. The latter is ``None`` for
    the node of an output; the former is ``None`` for an output without ``grad_fn``.
    """
    pending = [(getattr(output, "grad_fn", None), None) for output in outputs]
    seen = set()
    while pending:
        yield (edge := pending.pop())
        node = edge[0]
        if node is not None and node not in seen:
            seen.add(node)
            pending += [(following, node) for following, _ in node.next_functions if following]


def leaf_of(node: Any) -> torch.Tensor | None:
    """Return the leaf whose gradient an ``AccumulateGrad`` node accumulates; ``None`` for any other
    node."""
    return node.variable if type(node) is _ACCUMULATE_GRAD else None


_ACCUMULATE_GRAD: Any = type(
    get_gradient_edge(torch.zeros((), device="cpu", requires_grad=True)).node
)
