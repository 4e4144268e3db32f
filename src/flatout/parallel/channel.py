"""The connection between the ranks. All ranks make the same calls in the same order."""

from __future__ import annotations

import abc
import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

MEETING_SECONDS = 1800.0
"""How long a rank waits for another. One that dies is noticed at once."""

Lost = Callable[[Exception], NoReturn]
"""Called when the connection to another rank is lost; ends the process."""


class Channel(abc.ABC):
    """A connection between the ranks.

    All tensors that it gets are contiguous and on its device. Sums are of floating-point numbers,
    and have the same bits on all ranks.

    Args:
        rank, size: of this process.
        lost: called when a rank cannot be reached any more.

    Attributes:
        device: on which its tensors are.
        is_fast: whether an exchange takes microseconds, and its bytes as long as to copy them.
    """

    is_fast = False

    def __init__(self, rank: int, size: int, lost: Lost) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device("cpu")
        self._lost = lost

    @abc.abstractmethod
    def meet(self, message: bytes) -> list[memoryview]:
        """Return the messages of all ranks, by rank; all have the same length. They may be written
        to."""

    def exchange(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank; they may differ in length."""
        sizes = [
            int.from_bytes(size, "little") for size in self.meet(len(message).to_bytes(8, "little"))
        ]
        longest = max(*sizes, 1)
        messages = self.meet(message.ljust(longest, b"\0"))
        return [bytes(padded[:size]) for padded, size in zip(messages, sizes, strict=True)]

    @abc.abstractmethod
    def gather(
        self, tensors: Sequence[torch.Tensor], targets: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        """Copy the tensors of all ranks.

        Args:
            tensors: of this rank.
            targets: for each rank, what is to hold its tensors; of the same dtypes and shapes.
        """

    @abc.abstractmethod
    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all ranks."""

    @abc.abstractmethod
    def average(self, tensors: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
        """Compute the means of tensors over all ranks. Those of half precision are added up in
        float32.

        Args:
            tensors: all of one dtype.
            means: what is to hold the means, of the same dtype and shapes; may be the same tensors.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the other ranks, for which the connection is lost then."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Leave the connection as it is, in the child of a fork."""


class Group(Channel):
    """A channel over a process group of torch: gloo, NCCL or XCCL.

    On an accelerator, exchanges are put into the current stream, and the host does not wait.

    Args:
        group: the process group; the channel owns it.
        rank, size: of this process.
        lost: called when a rank cannot be reached any more.
        device: on which the group exchanges tensors.
    """

    def __init__(
        self, group: Any, rank: int, size: int, lost: Lost, device: torch.device | None = None
    ) -> None:
        super().__init__(rank, size, lost)
        self._group = group
        self.device = device or self.device

    def meet(self, message: bytes) -> list[memoryview]:
        """Return the messages of all ranks, by rank; all have the same length."""
        length = len(message)
        rows = bytearray(self.size * length)
        if length:
            own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
            whole = torch.frombuffer(rows, dtype=torch.uint8)
            whole.copy_(self._gather_rows(own.to(self.device)).view(-1))
        view = memoryview(rows)
        return [view[rank * length : (rank + 1) * length] for rank in range(self.size)]

    def gather(
        self, tensors: Sequence[torch.Tensor], targets: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        """Copy the tensors of all ranks."""
        offsets = [_aligned([target.nbytes for target in of_rank]) for of_rank in targets]
        longest = max(of_rank[-1] for of_rank in offsets)
        own = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        for tensor, start in zip(tensors, offsets[self.rank], strict=False):
            own[start : start + tensor.nbytes] = as_bytes(tensor)
        for row, of_rank, starts in zip(self._gather_rows(own), targets, offsets, strict=True):
            for target, start in zip(of_rank, starts, strict=False):
                found = row[start : start + target.nbytes]
                target.copy_(found.view(target.dtype).view(target.shape))

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all ranks."""
        for tensor in tensors:
            self._wait(self._begin(functools.partial(self._group.allreduce, [tensor])))

    def average(self, tensors: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
        """Compute the means of tensors over all ranks."""
        self.begin_average(tensors)(means)

    def begin_average(
        self, tensors: Sequence[torch.Tensor]
    ) -> Callable[[Sequence[torch.Tensor]], None]:
        """Begin to compute means, of what the tensors hold now; the arguments are as for
        ``average``. Returns what waits for the means and writes them."""
        flat = torch.cat([for_sum(tensor.reshape(-1)) for tensor in tensors])
        work = self._begin(functools.partial(self._group.allreduce, [flat]))
        sizes = [tensor.numel() for tensor in tensors]

        def finish(means: Sequence[torch.Tensor]) -> None:
            self._wait(work)
            flat.mul_(1 / self.size)
            for mean, part in zip(means, flat.split(sizes), strict=True):
                mean.copy_(part.view(mean.shape))

        return finish

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

    def _gather_rows(self, own: torch.Tensor) -> torch.Tensor:
        """Return the bytes of all ranks, as many of each, as the rows of a matrix."""
        rows = torch.empty(self.size * own.numel(), dtype=torch.uint8, device=self.device)
        self._wait(self._begin(functools.partial(self._group._allgather_base, rows, own)))
        return rows.view(self.size, own.numel())

    def _begin(self, begin: Callable[[], Any]) -> Any:
        try:
            return begin()
        except RuntimeError as error:
            self._lost(error)

    def _wait(self, work: Any) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            self._lost(error)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the elements of a tensor, in their logical order, as a channel takes them."""
    return tensor.detach().to(device).resolve_conj().resolve_neg().contiguous()


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elements of a tensor, in their logical order, as bytes on its device."""
    return on_device(tensor, tensor.device).reshape(-1).view(torch.uint8)


def for_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Return numbers of half precision as float32: a sum over ranks must not round more."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _aligned(sizes: Sequence[int]) -> list[int]:
    """Return where parts of these sizes begin in a buffer, and its size, all multiples of 16: so
    each part may be viewed as any dtype."""
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + -(-size // 16) * 16)
    return offsets
