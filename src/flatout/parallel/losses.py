"""Losses that a program computes of gathered outputs: each rank computes the terms of its own
samples only, and all get the sum.

That is done for large outputs of which the loss gets nothing but a view, because softmax over a
large vocabulary takes as long as other parts of a step. The terms are those of the rank's own part,
from before it was gathered, so that backward calls need not gather either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.parallel import crossing, sums
from flatout.parallel.team import Team

LEAST_ELEMENTS = 1 << 18
"""Elements of an output from which on sharing its loss out pays."""

_VIEWS = ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0")
"""Nodes of what has the same elements in the same order."""


@dataclass(frozen=True)
class _OwnPart:
    """The own part of an output that was gathered.

    Attributes:
        node: of the gathered outputs.
        tensor: the own part.
        start, stop: its rows in the loss's input: the first, and the one after the last.
    """

    node: Any
    tensor: torch.Tensor
    start: int
    stop: int


def share(
    team: Callable[[], Team | None], name: str, given: dict[str, Any]
) -> dispatch.DeferredCall | None:
    """Return the call that computes a loss together with the other ranks; ``None``: it is left as
    it is.

    Args:
        team: returns the ranks if this process may meet them now.
        name: of the operator, which adds up its terms.
        given: its arguments by name.
    """
    inputs, target = given["self"], given["target"]
    if torch._C._functorch.maybe_current_level() is not None:
        return None
    if inputs.numel() < LEAST_ELEMENTS or inputs.dim() < 2 or target.requires_grad:
        return None
    if target.shape[:1] != inputs.shape[:1] or not target.shape:
        return None
    if name not in sums.BY_CLASS and (
        target.shape != inputs.shape or given.get("weight") is not None
    ):
        return None
    own = _find_own_part(inputs)
    found = None if own is None else team()
    if own is None or found is None or own.node.crossing.team is not found:
        return None
    return dispatch.DeferredCall(_compute, (found, name, given, own))


def _find_own_part(inputs: torch.Tensor) -> _OwnPart | None:
    """Return the own part of what a loss gets, ``None`` if that is no gathered output."""
    node: Any = inputs.grad_fn
    number = inputs.output_nr
    while node is not None and node.name() in _VIEWS:
        node, number = node.next_functions[0]
    if not crossing.is_gather(node) or not inputs.is_contiguous():
        return None
    part = node.parts[number]
    batch = node.crossing.batch
    if part is None or node.crossing.dims[number] != 0 or inputs.shape[0] % batch:
        return None
    rows_of_sample = inputs.shape[0] // batch
    start, stop = node.crossing.own_rows
    return _OwnPart(node, part, start * rows_of_sample, stop * rows_of_sample)


def _compute(team: Team, name: str, given: dict[str, Any], own: _OwnPart) -> torch.Tensor:
    rows = own.stop - own.start
    inputs = own.tensor.reshape(rows, *given["self"].shape[1:])
    target = given["target"].narrow(0, own.start, rows)
    terms, count = sums.compute_terms(name, {**given, "self": inputs, "target": target})
    anchor = None
    if not terms.requires_grad:  # it may on another rank
        anchor = torch.empty(0, device="cpu", requires_grad=True)
    total: torch.Tensor = sums.SharedLoss.apply(
        team, own.node.graph, terms.sum(dtype=torch.float64), count, anchor
    )
    return total.to(terms.dtype)
