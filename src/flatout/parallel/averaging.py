"""Averaging gradients over the ranks after each backward call.

What reached a leaf through a shared root call is partial, times the number of ranks, so the mean is
the gradient. What reached it otherwise is the same on all ranks, and its own mean. So averaging
again changes nothing, and accumulated gradients need no care.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from flatout.intercept.gradients import stored_gradient
from flatout.intercept.identity import WeakIdentityDict
from flatout.parallel import shards
from flatout.parallel.crossing import Crossing, gather
from flatout.parallel.header import Header, Meeting, digest
from flatout.parallel.placement import UnshareableError
from flatout.parallel.team import Team

_autograd: Any = torch.autograd


class Leaves:
    """The leaves whose gradients may be partial, numbered alike on all ranks."""

    def __init__(self) -> None:
        self._numbers: WeakIdentityDict[torch.Tensor, int] = WeakIdentityDict()
        self._next = itertools.count()

    def add(self, leaves: Iterable[torch.Tensor]) -> None:
        """Add leaves, in an order that is the same on all ranks."""
        for leaf in leaves:
            if leaf not in self._numbers:
                self._numbers[leaf] = next(self._next)

    def numbered(self) -> dict[int, torch.Tensor]:
        """Return the living leaves by their numbers."""
        return {number: leaf for leaf, number in self._numbers.items()}

    def have_hooks(self) -> bool:
        """Whether the program sees a gradient before it is averaged."""
        leaves: Any = self._numbers.keys()
        return any(leaf._backward_hooks or leaf._post_accumulate_grad_hooks for leaf in leaves)


class Averaging:
    """Called around each backward call and each call of ``torch.autograd.grad``.

    Args:
        leaves: those that shared calls have reached.
        team: returns the ranks, ``None`` while nothing has been shared out.
        is_in_shard: whether this thread computes a shard now.
    """

    def __init__(
        self,
        leaves: Leaves,
        team: Callable[[], Team | None],
        is_in_shard: Callable[[], bool],
    ) -> None:
        self._leaves = leaves
        self._team = team
        self._is_in_shard = is_in_shard
        self._depth = 0

    def __call__(
        self, call: Callable[..., Any], outputs: Any, gradients: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Make a backward call, and average what it has computed."""
        accumulates = bool(kwargs.get("accumulate_grad"))
        if self._is_in_shard():
            if accumulates and not shards.is_in_tested_backward():
                raise UnshareableError("it makes a backward call in its forward pass")
            return call(outputs, gradients, *args, **kwargs)
        team = self._team()
        if team is None or self._depth:
            return call(outputs, gradients, *args, **kwargs)
        is_differentiable = bool(args[1]) if len(args) > 1 else bool(kwargs.get("create_graph"))
        before = self._stored() if accumulates else {}
        self._depth += 1
        try:
            result = call(outputs, gradients, *args, **kwargs)
        except Exception:
            if accumulates:  # some gradients may have been stored already
                self._average_stored(team, before)
            raise
        finally:
            self._depth -= 1
        if accumulates:
            self._average_stored(team, before)
            return result
        return _average_results(team, args[2], result, is_differentiable)

    def _stored(self) -> dict[int, tuple[torch.Tensor | None, int]]:
        """Return the gradients of all leaves and their versions."""
        found = {}
        for number, leaf in self._leaves.numbered().items():
            gradient = stored_gradient.__get__(leaf)
            found[number] = gradient, -1 if gradient is None else gradient._version
        return found

    def _average_stored(
        self, team: Team, before: dict[int, tuple[torch.Tensor | None, int]]
    ) -> None:
        """Average the stored gradients that have changed.

        Args:
            team: the ranks.
            before: what ``_stored`` returned before the backward call.
        """
        after = self._stored()
        changed = [
            n
            for n, (gradient, version) in after.items()
            if _differs(before.get(n), gradient, version)
        ]
        changed = _agree(team, changed, "makes a backward call")
        leaves = self._leaves.numbered()
        differentiable: list[Any] = []
        plain: list[Any] = []
        with torch.no_grad():
            for number in changed:
                leaf: Any = leaves[number]
                gradient = stored_gradient.__get__(leaf)
                if gradient is None:  # reached on other ranks only
                    leaf.grad = gradient = torch.zeros_like(leaf, requires_grad=False)
                (differentiable if gradient.requires_grad else plain).append(leaf)
            stored = [stored_gradient.__get__(leaf) for leaf in plain]
            for leaf, gradient, mean in zip(plain, stored, team.average(stored), strict=True):
                if gradient.is_sparse:
                    leaf.grad = mean
                    continue
                with _autograd._unsafe_preserve_version_counter(gradient):
                    gradient.copy_(mean)
        if differentiable:
            with torch.enable_grad():
                means = _means(team, [stored_gradient.__get__(leaf) for leaf in differentiable])
            for leaf, mean in zip(differentiable, means, strict=True):
                leaf.grad = mean


def _differs(
    before: tuple[torch.Tensor | None, int] | None, gradient: torch.Tensor | None, version: int
) -> bool:
    if before is None:
        return gradient is not None
    return gradient is not before[0] or version != before[1]


def _agree(team: Team, own: Sequence[int], what: str) -> list[int]:
    """Return the numbers that any rank has; the numbers themselves are sent if they differ."""
    header = Header(0, Meeting.GRADIENTS, subject=digest(what), content=digest(list(own)))
    headers = team.meet(header, what, ("sequence", "meeting", "subject"))
    if len({other.content for other in headers}) == 1:
        return list(own)
    return team.collect_numbers(own)


def _average_results(
    team: Team,
    inputs: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor | None],
    is_differentiable: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Return the means of what ``torch.autograd.grad`` returns."""
    found = list(results)
    own = [i for i, result in enumerate(found) if result is not None]
    present = _agree(team, own, "computes gradients")
    for i in present:
        if found[i] is None:  # reached on other ranks only
            found[i] = torch.zeros_like(inputs[i], requires_grad=False)
    gradients = [result for result in found if result is not None]
    with torch.set_grad_enabled(is_differentiable):
        means = _means(team, gradients) if is_differentiable else team.average(gradients)
    for i, mean in zip(present, means, strict=True):
        found[i] = mean
    return tuple(found)


def _means(team: Team, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return differentiable means over the ranks."""
    return gather(Crossing(team, 0, (None,) * len(tensors)), tensors, "computes gradients")
