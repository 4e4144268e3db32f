"""Sums over samples in the tests of a rule: a part of the batch goes on with those of the whole.

So what a batch norm does for a sample depends on this sample only, and what all parts would have
added up can be compared with the sums of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flatout.parallel.placement import UnshareableError


class WholeSums:
    """Records what a call of the whole batch adds up over its samples.

    Attributes:
        values: for each time, the numbers of all tensors. They are no tensors, which would look as
            if the program had kept them.
    """

    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def add_up(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Record the numbers, and return them."""
        self.values.append(_numbers(tensors))
        return tensors


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
        values = self._whole.values[number] if number < len(self._whole.values) else []
        if len(values) != len(self._own[-1]):
            raise UnshareableError("normalises something else for a part of the batch")
        found = torch.tensor(values, dtype=torch.float64).mul_(factor)
        sizes = [tensor.numel() for tensor in tensors]
        pairs = zip(found.split(sizes), tensors, strict=True)
        return [value.to(tensor).view_as(tensor) for value, tensor in pairs]

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
    for number, values in enumerate(whole):
        expected = torch.tensor(values, dtype=torch.float64) * parts[0]._factors[number]
        found = torch.tensor([part._own[number] for part in parts], dtype=torch.float64).sum(0)
        largest = expected.abs().max() if len(values) else torch.zeros(())
        if not bool(((found - expected).abs() <= tolerance * largest).all()):
            return False
    return True


def _numbers(tensors: Sequence[torch.Tensor]) -> list[float]:
    return [number for tensor in tensors for number in tensor.reshape(-1).tolist()]
