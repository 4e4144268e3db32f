"""Where the samples are in the random numbers that a call draws, and in what it adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch


class UnshareableError(BaseException):
    """A call cannot be shared out; all ranks compute it whole. The message is one clause.

    It is no ``Exception``, so that most handlers of the program let it pass.

    Attributes:
        last_reason: the message of the last one that was made, for those that it does not let pass.
    """

    last_reason: ClassVar[str] = ""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        UnshareableError.last_reason = reason


@dataclass(frozen=True)
class Rows:
    """The samples of a shard.

    Attributes:
        start, stop: the first sample and the one after the last.
        batch: number of samples of the whole call.
    """

    start: int
    stop: int
    batch: int

    @property
    def count(self) -> int:
        """Number of samples of the shard."""
        return self.stop - self.start


@dataclass(frozen=True)
class Draw:
    """Random numbers that an operator draws, or terms that it adds up.

    Attributes:
        operator: its name, without ``aten::``.
        shape: of the tensor that it fills, or of the terms.
        is_divisible: whether as many numbers are drawn for each element, whatever the values are.
        order: the dimensions of the tensor in memory, the innermost first; empty: not known.
    """

    operator: str
    shape: tuple[int, ...]
    is_divisible: bool = True
    order: tuple[int, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Placement:
    """Where the samples are in the tensor that a draw fills, or whose elements are added up.

    Attributes:
        operator: as in ``Draw``.
        dims: number of dimensions of the tensor.
        dim: the dimension that counts samples, or samples times something else; ``None`` if the
            draw is the same for any number of samples.
        is_outer: of a dimension that counts samples times something else: whether what belongs to
            a sample is contiguous in it (batch x heads) or not (length x batch).
        order: as in ``Draw``, of the tensor for all samples: the strides of one sample do not tell.
    """

    operator: str
    dims: int
    dim: int | None
    is_outer: bool = True
    order: tuple[int, ...] = field(default=(), compare=False)

    def fits(self, draw: Draw, rows: Rows) -> bool:
        """Whether a draw of a shard may be the one that was placed."""
        return (self.operator, self.dims) == (draw.operator, len(draw.shape)) and (
            self.dim is None or draw.shape[self.dim] % rows.count == 0
        )

    def whole_shape(self, shape: Sequence[int], rows: Rows) -> list[int]:
        """Return the shape of the tensor for all samples.

        Args:
            shape: of the tensor for the samples ``rows``.
            rows: of the shard.
        """
        whole = list(shape)
        if self.dim is not None:
            whole[self.dim] = whole[self.dim] // rows.count * rows.batch
        return whole

    def take(self, whole: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return the part of a tensor for all samples that belongs to a shard."""
        if self.dim is None:
            return whole
        part = self._select(whole, rows)
        return part if self.is_outer else part.flatten(self.dim, self.dim + 1)

    def put(self, whole: torch.Tensor, part: torch.Tensor, rows: Rows) -> None:
        """Write a shard's part into a tensor for all samples."""
        if self.dim is not None and not self.is_outer:
            part = _split(part, self.dim, rows.count)
        self._select(whole, rows).copy_(part)

    def _select(self, whole: torch.Tensor, rows: Rows) -> torch.Tensor:
        if self.dim is None:
            return whole
        each = whole.shape[self.dim] // rows.batch
        if self.is_outer:
            return whole.narrow(self.dim, rows.start * each, rows.count * each)
        return _split(whole, self.dim, rows.batch).narrow(self.dim + 1, rows.start, rows.count)


def _split(tensor: torch.Tensor, dim: int, samples: int) -> torch.Tensor:
    """Return a view with a dimension of its own for the samples, behind ``dim``."""
    shape = tensor.shape
    return tensor.view(*shape[:dim], shape[dim] // samples, samples, *shape[dim + 1 :])


def place(
    whole: Sequence[Draw], part: Sequence[Draw], batch: int, rows: int, is_outer: bool = True
) -> tuple[Placement, ...]:
    """Find where the samples are in each draw of a call.

    Args:
        whole: the draws of the call with all samples.
        part: those of the call with some of them.
        batch, rows: how many samples these are; they differ.
        is_outer: of every dimension that counts samples times something else; shapes do not tell,
            so whoever compares the values of both calls may try both.

    Raises:
        UnshareableError: the draws differ in more than the number of samples.
    """
    if [draw.operator for draw in whole] != [draw.operator for draw in part]:
        raise UnshareableError("draws other random numbers for fewer samples")
    return tuple(
        _place_draw(*pair, batch, rows, is_outer) for pair in zip(whole, part, strict=True)
    )


def _place_draw(whole: Draw, part: Draw, batch: int, rows: int, is_outer: bool) -> Placement:
    dims = len(whole.shape)
    if whole.shape == part.shape:
        return Placement(whole.operator, dims, None)
    if not whole.is_divisible:
        raise UnshareableError(f"draws random numbers by {whole.operator}")
    different = []
    if len(part.shape) == dims:
        pairs = enumerate(zip(whole.shape, part.shape, strict=True))
        different = [dim for dim, (size, of_part) in pairs if size != of_part]
    if len(different) != 1:
        raise UnshareableError("draws random numbers of another form for fewer samples")
    (dim,) = different
    each, rest = divmod(whole.shape[dim], batch)
    if rest or part.shape[dim] != each * rows:
        raise UnshareableError("draws random numbers whose count does not grow with the samples")
    return Placement(whole.operator, dims, dim, is_outer or each == 1, whole.order)
