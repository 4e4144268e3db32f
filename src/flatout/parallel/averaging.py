"""Averaging gradients over the ranks after each backward call.

What reached a leaf through a shared root call is partial, times the number of ranks, so the mean is
the gradient. What reached it otherwise is the same on all ranks, and its own mean. So averaging
again changes nothing, and accumulated gradients need no care.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flatout.intercept.gradients import stored_gradient
from flatout.intercept.identity import WeakIdentityDict, WeakIdentitySet
from flatout.parallel import shards
from flatout.parallel.balance import Exchange, Phase
from flatout.parallel.crossing import Crossing, gather, reaches_shards
from flatout.parallel.header import Header, Meeting, digest
from flatout.parallel.overlapping import Overlap
from flatout.parallel.placement import UnshareableError
from flatout.parallel.team import Team


class Leaves:
    """The leaves whose gradients are averaged, numbered alike on all ranks: those whose gradients
    may be partial, and those whose gradients might have other bits on each rank."""

    def __init__(self) -> None:
        self._shared: WeakIdentitySet[torch.Tensor] = WeakIdentitySet()
        self._numbers: WeakIdentityDict[torch.Tensor, int] = WeakIdentityDict()
        self._next = itertools.count()

    def add(self, leaves: Iterable[torch.Tensor]) -> None:
        """Add leaves that a shared call reaches, in an order that is the same on all ranks."""
        for leaf in leaves:
            self._shared.add(leaf)
            self._number(leaf)

    def add_whole(self, leaves: Iterable[torch.Tensor]) -> None:
        """Add leaves that no shared call may ever reach, in an order that is the same on all
        ranks."""
        for leaf in leaves:
            self._number(leaf)

    def _number(self, leaf: torch.Tensor) -> None:
        if leaf not in self._numbers:
            self._numbers[leaf] = next(self._next)

    def __contains__(self, leaf: torch.Tensor) -> bool:
        return leaf in self._numbers

    def numbered(self) -> dict[int, torch.Tensor]:
        """Return the living leaves by their numbers."""
        return {number: leaf for leaf, number in self._numbers.items()}

    def have_hooks(self) -> bool:
        """Whether the program sees a gradient before it is averaged."""
        leaves: Any = self._shared
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
        self._turn = threading.RLock()
        self._overlap: Overlap | None = None

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
        if team is None:
            return call(outputs, gradients, *args, **kwargs)
        if not accumulates:
            return self._make(team, call, outputs, gradients, *args, **kwargs)
        if not self._turn.acquire(blocking=False):
            # What one thread accumulates while another averages would be lost or averaged.
            team.ending.stop("--ranks does not support backward calls in two threads at one time")
        try:
            return self._make(team, call, outputs, gradients, *args, **kwargs)
        finally:
            self._turn.release()

    def _make(
        self,
        team: Team,
        call: Callable[..., Any],
        outputs: Any,
        gradients: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if self._is_apart(team, outputs):
            return call(outputs, gradients, *args, **kwargs)
        with team.balance.spend(Phase.COMPARISON):
            return self._make_together(team, call, outputs, gradients, *args, **kwargs)

    def _make_together(
        self,
        team: Team,
        call: Callable[..., Any],
        outputs: Any,
        gradients: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        accumulates = bool(kwargs.get("accumulate_grad"))
        is_differentiable = bool(args[1]) if len(args) > 1 else bool(kwargs.get("create_graph"))
        is_kept = bool(args[0]) if args else bool(kwargs.get("keep_graph"))
        before = self._stored() if accumulates else {}
        if accumulates and self._overlap is None and team.can_average_beside:
            self._overlap = Overlap(team)
        self._depth += 1
        team.balance.count(Exchange.BACKWARD)
        try:
            with team.balance.spend_backward(), contextlib.ExitStack() as watch:
                if accumulates and self._overlap is not None:
                    watch.enter_context(self._overlap.watching(self._leaves.numbered()))
                result = call(outputs, gradients, *args, **kwargs)
        except Exception:
            if accumulates:  # some gradients may have been stored already
                self._average_stored(team, before)
            raise
        finally:
            self._depth -= 1
            team.graphs.close_reached(is_kept)
        if accumulates:
            self._average_stored(team, before)
            return result
        return _average_results(team, args[2], result, is_differentiable)

    @property
    def is_active(self) -> bool:
        """Whether a backward call is being made."""
        return self._depth > 0

    def include(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the gradients of all that an optimizer updates, from its next step on.

        Rounding may differ between ranks where threads add up, and would add up itself.
        """
        team = self._team()
        if team is None or self.is_active or self._is_in_shard():
            return
        updated = [leaf for group in optimizer.param_groups for leaf in group["params"]]
        if all(leaf in self._leaves for leaf in updated):
            return
        before = self._stored()
        self._leaves.add_whole(updated)
        self._average_stored(team, before)

    def _is_apart(self, team: Team, outputs: Sequence[Any]) -> bool:
        """Return whether a backward call is none of those that the ranks make together."""
        if threading.get_ident() != team.thread:
            if reaches_shards(outputs):
                team.ending.stop(
                    "--ranks does not support backward calls in another thread than the one that "
                    "calls the modules"
                )
            return True
        return self._depth > 0 or _is_transformed(outputs)

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
        own = {n: gradient for n in changed if (gradient := after[n][0]) is not None}
        leaves = self._leaves.numbered()
        forms = _agree(team, own, "makes a backward call", self._overlap)
        differentiable: list[Any] = []
        plain: list[Any] = []
        with torch.no_grad():
            averaged = set() if self._overlap is None else self._overlap.finish()
            for number, form in forms.items():
                if number in averaged:
                    continue
                leaf: Any = leaves[number]
                gradient = stored_gradient.__get__(leaf)
                if gradient is None or gradient.is_sparse != form.is_sparse:
                    with torch.set_grad_enabled(form.is_recorded):
                        leaf.grad = form.convert(gradient, leaf)
                (differentiable if form.is_recorded else plain).append(leaf)
            stored = [stored_gradient.__get__(leaf) for leaf in plain]
            for leaf, mean in zip(plain, team.average(stored, in_place=True), strict=True):
                if mean.is_sparse:
                    leaf.grad = mean
        if differentiable:
            with torch.enable_grad():
                means = _means(team, [stored_gradient.__get__(leaf) for leaf in differentiable])
            for leaf, mean in zip(differentiable, means, strict=True):
                leaf.grad = mean


def _is_transformed(outputs: Sequence[Any]) -> bool:
    """Whether ``torch.func`` makes a backward call through what was not shared out."""
    functorch: Any = torch._C._functorch
    return functorch.maybe_current_level() is not None and not reaches_shards(outputs)


def _differs(
    before: tuple[torch.Tensor | None, int] | None, gradient: torch.Tensor | None, version: int
) -> bool:
    if before is None:
        return gradient is not None
    return gradient is not before[0] or version != before[1]


@dataclass(frozen=True)
class _Form:
    """How gradients are stored.

    Attributes:
        sparse_dims: number of sparse dimensions; 0: it is dense.
        is_recorded: whether it is part of a graph.
    """

    sparse_dims: int
    is_recorded: bool

    @classmethod
    def of(cls, gradient: torch.Tensor) -> _Form:
        """Return the form of a gradient."""
        return cls(gradient.sparse_dim() if gradient.is_sparse else 0, gradient.requires_grad)

    @property
    def is_sparse(self) -> bool:
        """Whether it is sparse."""
        return self.sparse_dims > 0

    def __add__(self, other: _Form) -> _Form:
        """Return the form of the sum of two gradients."""
        is_recorded = self.is_recorded or other.is_recorded
        is_alike = self.sparse_dims == other.sparse_dims
        return _Form(self.sparse_dims if is_alike and not is_recorded else 0, is_recorded)

    def convert(self, gradient: torch.Tensor | None, leaf: torch.Tensor) -> torch.Tensor:
        """Return a gradient in this form; ``None`` stands for zeros."""
        if gradient is not None:
            return gradient.to_dense() if gradient.is_sparse and not self.is_sparse else gradient
        if not self.is_sparse:
            return torch.zeros_like(leaf, requires_grad=False)
        indices = torch.empty(self.sparse_dims, 0, dtype=torch.long, device=leaf.device)
        values = leaf.new_empty(0, *leaf.shape[self.sparse_dims :])
        return torch.sparse_coo_tensor(indices, values, leaf.shape, check_invariants=False)


def _agree(
    team: Team, own: Mapping[int, torch.Tensor], what: str, overlap: Overlap | None = None
) -> dict[int, _Form]:
    """Return the forms of the gradients that any rank has.

    Args:
        team: the ranks.
        own: the gradients of this rank by their numbers.
        what: this rank does.
        overlap: what was averaged meanwhile; it learns what other ranks have begun.
    """
    forms = [(n, *dataclasses.astuple(_Form.of(own[n]))) for n in sorted(own)]
    header = Header(0, Meeting.GRADIENTS, subject=digest(what), content=digest(forms))
    if overlap is not None:
        header = overlap.add_progress(header)
    headers = team.meet(header, what, ("sequence", "meeting", "subject"))
    if overlap is not None:
        overlap.learn(headers)
    of_ranks = [forms]
    if len({other.content for other in headers}) > 1:
        of_ranks = [json.loads(text) for text in team.channel.exchange(json.dumps(forms).encode())]
    found: dict[int, _Form] = {}
    for number, *fields in itertools.chain.from_iterable(of_ranks):
        form = _Form(*fields)
        found[number] = found[number] + form if number in found else form + form
    return dict(sorted(found.items()))


def _average_results(
    team: Team,
    inputs: Sequence[torch.Tensor],
    results: Sequence[torch.Tensor | None],
    is_differentiable: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Return the means of what ``torch.autograd.grad`` returns."""
    found = list(results)
    own = {i: result for i, result in enumerate(found) if result is not None}
    present = _agree(team, own, "computes gradients")
    with torch.set_grad_enabled(is_differentiable):
        gradients = [form.convert(found[i], inputs[i]) for i, form in present.items()]
        means = _means(team, gradients) if is_differentiable else team.average(gradients)
    for i, mean in zip(present, means, strict=True):
        found[i] = mean
    return tuple(found)


def _means(team: Team, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return differentiable means over the ranks."""
    return gather(Crossing(team, 0, (None,) * len(tensors)), tensors, "computes gradients")
