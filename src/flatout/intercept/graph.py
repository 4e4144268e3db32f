"""The graph that autograd goes through in a backward call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge


def edges(outputs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """All nodes that a backward call from ``outputs`` reaches, each once for every node that it is
    reached from.

    An output is reached from ``None``; the node of one that has none is ``None``.
    """
    left = [(getattr(output, "grad_fn", None), None) for output in outputs]
    seen = set()
    while left:
        yield (edge := left.pop())
        node = edge[0]
        if node is not None and node not in seen:
            seen.add(node)
            left += [(following, node) for following, _ in node.next_functions if following]


def leaf_of(node: Any) -> torch.Tensor | None:
    """The leaf whose gradient a node adds to; ``None`` for a node of another kind."""
    return node.variable if type(node) is _ACCUMULATION else None


_ACCUMULATION: Any = type(get_gradient_edge(torch.zeros((), device="cpu", requires_grad=True)).node)
