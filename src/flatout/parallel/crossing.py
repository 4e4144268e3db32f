"""Where tensors cross between the whole batch and the shards, for autograd.

The gradients of parameters are averaged over the ranks after each backward call. So that their mean
is the gradient of the whole batch, what flows into a shard is multiplied by the number of ranks:

- *gather* joins the shards' outputs. Backward, a rank takes its own rows, times the number of
  ranks.
- *scatter* takes the own rows of an input. Backward, the rows of all ranks are gathered, over the
  number of ranks.
- A tensor that every rank gets whole passes scatter as it is; backward, its mean is taken. Gather
  takes the mean of such a tensor, and backward the mean of its gradient.

So each is the other's backward up to the factor, and double backward works by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from flatout.parallel.balance import Graph
from flatout.parallel.cutting import bounds, cut_tensor
from flatout.parallel.header import Header, Meeting
from flatout.parallel.sameness import structure_digest
from flatout.parallel.sums import is_sum
from flatout.parallel.team import Team


@dataclass(frozen=True)
class Crossing:
    """The crossing of some tensors between the whole batch and the shards.

    Attributes:
        team: the ranks.
        batch: the number of samples.
        dims: for each tensor, the dimension that counts samples; ``None``: every rank has it whole.
        graph: of the call that the tensors belong to; ``None``: they have one of their own.
    """

    team: Team
    batch: int
    dims: tuple[int | None, ...]
    graph: Graph | None = None

    def scatter(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the own rows of whole tensors."""
        rows = bounds(self.batch, self.team.size)[self.team.rank]
        pairs = zip(self.dims, tensors, strict=True)
        return [tensor if dim is None else cut_tensor(tensor, dim, *rows) for dim, tensor in pairs]

    def gather(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return whole tensors from those of the shards, and means of those that are whole."""
        rows = [stop - start for start, stop in bounds(self.batch, self.team.size)]
        cut = [i for i, dim in enumerate(self.dims) if dim is not None]
        whole = [i for i, dim in enumerate(self.dims) if dim is None]
        found: dict[int, torch.Tensor] = {}
        if cut:
            dims = [dim for dim in self.dims if dim is not None]
            gathered = self.team.gather([tensors[i] for i in cut], dims, rows)
            found.update(zip(cut, gathered, strict=True))
        if whole:
            found.update(zip(whole, self.team.average([tensors[i] for i in whole]), strict=True))
        return [found[i] for i in range(len(tensors))]

    def select(self, wanted: Sequence[bool]) -> Crossing:
        """Return the crossing of some of the tensors."""
        dims = tuple(dim for dim, is_wanted in zip(self.dims, wanted, strict=True) if is_wanted)
        return replace(self, dims=dims)

    def scaled(self, tensors: Sequence[torch.Tensor], factor: float) -> list[torch.Tensor]:
        """Return the tensors, those of shards times a factor."""
        pairs = zip(self.dims, tensors, strict=True)
        return [tensor if dim is None else tensor * factor for dim, tensor in pairs]


def scatter(crossing: Crossing, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the own rows of tensors.

    Args:
        crossing: of the tensors.
        tensors: of the whole batch, the same on all ranks.

    Returns:
        The own rows, and a last, empty tensor to be given to ``gather_anchored``.
    """
    apply: Any = _Scatter.apply
    return list(apply(crossing, *tensors))


def gather(crossing: Crossing, tensors: Sequence[torch.Tensor], what: str) -> list[torch.Tensor]:
    """Return the tensors of the whole batch, after a meeting about them.

    Args:
        crossing: of the tensors.
        tensors: of this rank's shard.
        what: what this rank does, in the sentence that is printed if the ranks have parted.
    """
    is_recorded = torch.is_grad_enabled()
    bits = flags([is_recorded and tensor.requires_grad for tensor in tensors])
    header = Header(
        0,
        Meeting.CROSSING,
        subject=len(tensors),
        structure=structure_digest(_without(crossing.dims, tensors)),
        bits=bits,
    )
    headers = crossing.team.meet(header, what)
    recorded = 0
    for other in headers:
        recorded |= other.bits
    return gather_anchored(crossing, tensors, recorded, None)


def gather_anchored(
    crossing: Crossing,
    tensors: Sequence[torch.Tensor],
    recorded: int,
    anchor: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Return the tensors of the whole batch.

    Args:
        crossing: of the tensors.
        tensors: of this rank's shard.
        recorded: one bit for each tensor: whether it requires a gradient on any rank. Autograd then
            has the same graph on all ranks.
        anchor: the last tensor that ``scatter`` returned. Through it, a backward call that reaches
            these tensors reaches the inputs on every rank.
    """
    if recorded and anchor is None and not any(tensor.requires_grad for tensor in tensors):
        anchor = torch.empty(0, device="cpu", requires_grad=True)
    apply: Any = _Gather.apply
    return list(apply(crossing, recorded, anchor, *tensors))


def flags(values: Sequence[bool]) -> int:
    """Return one bit for each value, the first one the lowest. Those after the 64th share it."""
    found = 0
    for i, value in enumerate(values):
        found |= value << min(i, 63)
    return found


def is_flagged(bits: int, i: int) -> bool:
    """Whether the bit of value ``i`` is set (see ``flags``)."""
    return bool(bits >> min(i, 63) & 1)


def _without(dims: Sequence[int | None], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of the tensors that have no rows, so that their shapes are the same on all
    ranks."""
    pairs = zip(dims, tensors, strict=True)
    return [tensor if dim is None else tensor.narrow(dim, 0, 0) for dim, tensor in pairs]


def reaches_shards(outputs: Iterable[Any]) -> bool:
    """Whether the graph of some tensors or ``GradientEdge`` has in it what shards have computed
    together."""
    gathers: Any = _Gather
    pending: list[Any] = [x.grad_fn if isinstance(x, torch.Tensor) else x.node for x in outputs]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        if isinstance(node, gathers._backward_cls) or is_sum(node):
            return True
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
    return False


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *tensors: torch.Tensor) -> Any:
        ctx.crossing = crossing
        ctx.graph = crossing.graph or crossing.team.graphs.open()
        return (*crossing.scatter(tensors), torch.empty(0, device="cpu"))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        crossing: Crossing = ctx.crossing
        ctx.graph.leave()
        scaled = crossing.scaled(gradients[:-1], 1 / crossing.team.size)
        return (None, *gather(crossing, scaled, "computes gradients of inputs"))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        crossing: Crossing,
        recorded: int,
        anchor: torch.Tensor | None,
        *tensors: torch.Tensor,
    ) -> Any:
        joined = crossing.gather(tensors)
        ctx.crossing = crossing
        ctx.graph = crossing.graph or crossing.team.graphs.open()
        ctx.recorded = [
            is_flagged(recorded, i) and _is_differentiable(t) for i, t in enumerate(joined)
        ]
        others = [t for t, is_recorded in zip(joined, ctx.recorded, strict=True) if not is_recorded]
        ctx.mark_non_differentiable(*others)
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        crossing: Crossing = ctx.crossing.select(ctx.recorded)
        ctx.graph.enter()
        wanted = [g for g, is_recorded in zip(gradients, ctx.recorded, strict=True) if is_recorded]
        parts = iter(_take_back(crossing, wanted))
        anchor = torch.zeros(0, device="cpu") if ctx.needs_input_grad[2] else None
        return None, None, anchor, *(next(parts) if found else None for found in ctx.recorded)


def _take_back(crossing: Crossing, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of what was gathered.

    That of a mean may be partial, and is made whole, since what it flows into computes with it.
    """
    parts = crossing.scaled(scatter(crossing, gradients)[:-1], crossing.team.size)
    is_mean = [dim is None for dim in crossing.dims]
    if any(is_mean):
        wanted = [part for part, is_whole in zip(parts, is_mean, strict=True) if is_whole]
        means = iter(gather(crossing.select(is_mean), wanted, "computes gradients of gradients"))
        parts = [next(means) if is_whole else p for p, is_whole in zip(parts, is_mean, strict=True)]
    return parts


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()
