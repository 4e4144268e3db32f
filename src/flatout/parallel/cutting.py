"""Cutting the arguments of a call into shards, and joining the outputs of the shards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flatout.intercept import objects
from flatout.intercept.nested import map_tensors
from flatout.parallel.kinds import Rule, caches_in, distinct_tensors, tensors_of_output


def batch_size(rule: Rule, leaves: Sequence[torch.Tensor]) -> int | None:
    """Return the number of samples, ``None`` if the tensors disagree on it.

    Args:
        rule: of the kind of the call.
        leaves: of the arguments (see ``kinds.leaves``).
    """
    if len(leaves) != len(rule.inputs):
        return None
    pairs = zip(rule.inputs, leaves, strict=True)
    cut_leaves = [(dim, leaf) for dim, leaf in pairs if dim is not None]
    if any(dim >= leaf.dim() for dim, leaf in cut_leaves):
        return None
    sizes = {leaf.shape[dim] for dim, leaf in cut_leaves}
    return sizes.pop() if len(sizes) == 1 else None


def bounds(batch: int, size: int) -> list[tuple[int, int]]:
    """Return the first row of each rank's shard and the row after its last; the numbers of rows
    differ by at most one.

    Args:
        batch: number of samples.
        size: number of ranks.
    """
    edges = [batch * rank // size for rank in range(size + 1)]
    return list(itertools.pairwise(edges))


def cut(rule: Rule, leaves: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Return the leaves of a shard: views where that keeps a contiguous tensor contiguous.

    Args:
        rule: of the kind of the call.
        leaves: of the whole call.
        start, stop: the first row of the shard and the row after its last.
    """
    pairs = zip(rule.inputs, leaves, strict=True)
    return [leaf if dim is None else cut_tensor(leaf, dim, start, stop) for dim, leaf in pairs]


def cut_tensor(tensor: torch.Tensor, dim: int, start: int, stop: int) -> torch.Tensor:
    """Return the rows from ``start`` to before ``stop`` along a dimension; contiguous if the tensor
    is."""
    rows = tensor.narrow(dim, start, stop - start)
    return rows.contiguous() if tensor.is_contiguous() else rows


def join(rule: Rule, shards: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the output's tensors for the whole batch.

    Args:
        rule: of the kind of the call.
        shards: for each rank, the tensors in the output of its shard.
    """
    columns = zip(*shards, strict=True)
    pairs = zip(rule.outputs, columns, strict=True)
    return [column[0] if dim is None else torch.cat(column, dim) for dim, column in pairs]


def rebuild(
    args: tuple[Any, ...], kwargs: dict[str, Any], leaves: Sequence[torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with other tensors in the place of its leaves.

    Args:
        args, kwargs: of the call; they stay as they are.
        leaves: in the order of ``kinds.leaves``.

    Raises:
        ValueError: a container cannot be copied without calling code of the program.
    """
    value = args, kwargs
    replace = _replacement(distinct_tensors(value), leaves)
    new_args, new_kwargs = map_tensors(replace, value)
    _require_only(leaves, distinct_tensors((new_args, new_kwargs)))
    return new_args, new_kwargs


def rebuild_output(value: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Return what a module has returned with other tensors in the place of its own.

    Args:
        value: which nobody else has got; caches in it are changed.
        tensors: in the order of ``kinds.tensors_of_output``.

    Raises:
        ValueError: a container cannot be copied without calling code of the program.
    """
    replace = _replacement(tensors_of_output(value), tensors)
    for cache in caches_in(value):
        held = objects.attributes(cache)
        held.update({name: map_tensors(replace, part) for name, part in held.items()})
    result = map_tensors(replace, value)
    _require_only(tensors, tensors_of_output(result))
    return result


def _replacement(
    old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that returns the tensor in the place of another one."""
    new_of = {id(before): after for before, after in zip(old, new, strict=True)}
    return lambda tensor: new_of.get(id(tensor), tensor)


def _require_only(tensors: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> None:
    """Test that what was found are only some tensors."""
    wanted = set(map(id, tensors))
    if any(id(tensor) not in wanted for tensor in found):
        raise ValueError("a container of tensors cannot be copied")
