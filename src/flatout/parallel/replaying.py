"""Sums over samples in the tests of a rule: a part of the batch goes on with those of the whole.

So what a batch norm or a loss does for a sample depends on this sample only, and what all parts
would have added up can be compared with the sums of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flatout.parallel.comparing import largest_magnitude
from flatout.parallel.placement import UnshareableError

_FLOOR = 1e-3
"""Sums are compared relative to their largest number, and at least to this part of the largest of
all: sums of gradients between two batch norms are nothing but rounding errors."""


class WholeSums:
    """Records what a call of the whole batch adds up over its samples.

    Attributes:
        values: for each time, the numbers of all tensors. They are no tensors, which would look as
            if the program had kept them.
        used: for each time, the numbers with which the call has gone on.
    """

    def __init__(self) -> None:
        self.values: list[list[float]] = []
        self.used: list[list[float]] = []

    def add_up(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Record the numbers, and return them."""
        self.values.append(_numbers(tensors))
        self.used.append(self.values[-1])
        return tensors

    def add_up_and_change(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Record the numbers, and return larger ones, of which none is 0 that was.

        So a factor is noticed that is wrong in shards, as where a module divides by its number of
        rows, even if the sum is 0.
        """
        self.values.append(_numbers(tensors))
        factor = 1 + 1 / (1 + len(self.values))
        changed = [math.ceil(1 + abs(value) * factor) for value in self.values[-1]]
        self.used.append([float(number) for number in changed])
        return _tensors_of(self.used[-1], tensors)


class PartSums:
    """Records what a call of a part adds up, and returns the sums of the whole call.

    Args:
        whole: sums of the whole call.

    Attributes:
        scale: by what gradients are multiplied in parts.
    """

    def __init__(self, whole: WholeSums) -> None:
        self.scale = 1
        self._whole = whole
        self._own: list[list[float]] = []
        self._factors: list[int] = []

    def add_up(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return sums over all samples."""
        return self._replay(tensors, 1)

    def add_up_gradients(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return sums of gradients over all samples."""
        return self._replay(tensors, self.scale)

    def _replay(self, tensors: list[torch.Tensor], factor: int) -> list[torch.Tensor]:
        number = len(self._own)
        self._own.append(_numbers(tensors))
        self._factors.append(factor)
        used = self._whole.used[number] if number < len(self._whole.used) else []
        if len(used) != len(self._own[-1]):
            raise UnshareableError("adds up something else for a part of the batch")
        return _tensors_of([value * factor for value in used], tensors)

    def has_as_many(self) -> bool:
        """Whether sums were asked for as often as in the whole call."""
        return len(self._own) == len(self._whole.values)


def have_sums_of_whole(parts: Sequence[PartSums], tolerance: float) -> bool:
    """Whether what all parts have added up makes the sums of the whole call.

    Args:
        parts: all of them.
        tolerance: difference relative to the largest number of a sum.
    """
    whole = parts[0]._whole.values
    if not all(part.has_as_many() for part in parts):
        return False
    sums = [torch.tensor(values, dtype=torch.float64) for values in whole]
    floor = _FLOOR * max(map(largest_magnitude, sums), default=0.0)
    for number, expected in enumerate(sums):
        found = torch.tensor([part._own[number] for part in parts], dtype=torch.float64).sum(0)
        factor = parts[0]._factors[number]
        largest = max(largest_magnitude(expected), floor)
        if not largest_magnitude(found / factor - expected) <= tolerance * largest:
            return False
    return True


def _tensors_of(numbers: list[float], like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return tensors of the sizes and dtypes of others."""
    found = torch.tensor(numbers, dtype=torch.float64).split([tensor.numel() for tensor in like])
    return [value.to(tensor).view_as(tensor) for value, tensor in zip(found, like, strict=True)]


def _numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    return [number for tensor in tensors for number in tensor.reshape(-1).tolist()]
