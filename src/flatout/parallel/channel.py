"""The connection between the ranks. All ranks make the same calls in the same order."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import torch

T = TypeVar("T")

Lost = Callable[[Exception], NoReturn]
"""Called when the connection to another rank is lost; ends the process."""


class Gloo:
    """A channel over gloo.

    Args:
        group: the process group; the channel owns it.
        rank, size: of this process.
        lost: called when a rank cannot be reached any more.
    """

    def __init__(self, group: Any, rank: int, size: int, lost: Lost) -> None:
        self.rank = rank
        self.size = size
        self._group = group
        self._lost = lost

    def meet(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank; all have the same length."""
        own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        return [bytes(row.tolist()) for row in self.gather(own)]

    def exchange(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank; they may differ in length."""
        sizes = [
            int.from_bytes(size, "little") for size in self.meet(len(message).to_bytes(8, "little"))
        ]
        longest = max(*sizes, 1)
        messages = self.meet(message.ljust(longest, b"\0"))
        return [padded[:size] for padded, size in zip(messages, sizes, strict=True)]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """Return the tensors of all ranks as the rows of a matrix.

        Args:
            own: a contiguous tensor of bytes in main memory, as long on every rank.
        """
        rows = torch.empty(self.size * own.numel(), dtype=torch.uint8, device="cpu")
        self._wait(lambda: self._group._allgather_base(rows, own))
        return rows.view(self.size, own.numel())

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor in main memory by its sum over all ranks, which has the same bits on
        each."""
        self._wait(lambda: self._group.allreduce([tensor]))

    def close(self) -> None:
        """Leave the group. Its threads must have ended before the interpreter does."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()

    def forget(self) -> None:
        """Leave the group as it is, in the child of a fork, where its threads do not exist."""
        # Its destructor would wait for them.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        self._group = None

    def _wait(self, begin: Callable[[], Any]) -> None:
        try:
            begin().wait()
        except RuntimeError as error:
            self._lost(error)


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor, in their logical order, as bytes in main memory."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)


def aligned(sizes: Sequence[int]) -> list[int]:
    """Return where parts of these sizes begin in a buffer, and its size, all multiples of 16: so
    each part may be viewed as any dtype."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // 16) * 16)
    return offsets
