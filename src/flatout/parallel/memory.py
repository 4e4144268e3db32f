"""A channel through memory that the ranks of one host share (``kernels/exchange.c``)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import mmap
import os
import select
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from flatout import kernels
from flatout.parallel.channel import MEETING_SECONDS, Channel, Lost, for_sum

LOOK_SECONDS = 0.05
"""After which a rank that waits looks whether the others live."""

INTERRUPTED_SECONDS = 5.0
"""How long a rank waits for the others once a signal's handler has raised an exception."""

_DONE, _WAITING, _LEFT, _DIFFERENT = range(4)
_GATHER = 0
_KINDS = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3}
"""Statuses and kinds of ``exchange.c``."""


class _Exchange(ctypes.Structure):
    """``struct exchange`` of ``exchange.c``, which tells what its fields are."""

    _fields_ = (
        ("mapping", ctypes.c_void_p),
        ("rank", ctypes.c_int32),
        ("ranks", ctypes.c_int32),
        ("kind", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("factor", ctypes.c_double),
        ("sources", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("round", ctypes.c_int64),
        ("rounds", ctypes.c_int64),
        ("wait_ns", ctypes.c_int64),
        ("first", ctypes.c_uint32),
    )


class Memory(Channel):
    """A channel through shared memory.

    Args:
        memory: descriptor of a file of ``mapping_bytes`` zeros, the same for all ranks.
        processes: for each rank, a descriptor of its process (pidfd_open(2)). The channel uses
            duplicates of all descriptors.
        rank, size: of this process.
        lost: called when a rank cannot be reached any more.
        news: tells how another rank has failed, ``None`` if none has.

    Raises:
        kernels.KernelError: the kernel is not available.
        OSError: the file cannot be mapped.
    """

    is_fast = True

    def __init__(
        self,
        memory: int,
        processes: Mapping[int, int],
        rank: int,
        size: int,
        lost: Lost,
        news: Callable[[], str | None],
    ) -> None:
        super().__init__(rank, size, lost)
        self._kernel = load_kernel()
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        self._mapping: mmap.mmap | None = mmap.mmap(memory, mapping_bytes(size), flags)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self._processes: dict[int, int] = {}
        self._deaths = select.poll()
        for of_rank, process in processes.items():
            if of_rank != rank:
                self._processes[os.dup(process)] = of_rank
        for process in self._processes:
            self._deaths.register(process, select.POLLIN)
        self._news = news
        self._is_at_rest = True

    def meet(self, message: bytes) -> list[memoryview]:
        """Return the messages of all ranks, by rank; all have the same length."""
        length = len(message)
        rows = bytearray(self.size * length or 1)
        start = ctypes.addressof(ctypes.c_char.from_buffer(rows))
        own = ctypes.c_char_p(message)
        pointer = ctypes.cast(own, ctypes.c_void_p).value or 0
        targets = [start + rank * length for rank in range(self.size)]
        self._run(_GATHER, [pointer], targets, [length] * self.size)
        view = memoryview(rows)
        return [view[rank * length : (rank + 1) * length] for rank in range(self.size)]

    def gather(
        self, tensors: Sequence[torch.Tensor], targets: Sequence[Sequence[torch.Tensor]]
    ) -> None:
        """Copy the tensors of all ranks."""
        _check_alike(tensors, targets[self.rank])
        pointers = [pointer for of_rank in targets for pointer in _pointers(of_rank)]
        ends = [end for of_rank in targets for end in _ends(of_rank)]
        self._run(_GATHER, _pointers(tensors), pointers, ends)

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all ranks."""
        self._add_up(tensors, tensors, 1.0)

    def average(self, tensors: Sequence[torch.Tensor], means: Sequence[torch.Tensor]) -> None:
        """Compute the means of tensors over all ranks."""
        if all(tensor.dtype in _KINDS for tensor in tensors):
            self._add_up(tensors, means, 1 / self.size)
            return
        wide = [for_sum(tensor) for tensor in tensors]
        self._add_up(wide, wide, 1 / self.size)
        for mean, found in zip(means, wide, strict=True):
            mean.copy_(found)

    def close(self) -> None:
        """Leave the other ranks."""
        if self._mapping is not None:
            self._kernel.leave(self._address, self.rank)
        self.forget()

    def forget(self) -> None:
        """Unmap the memory, once no exchange uses it any more."""
        self._mapping = None
        for process in self._processes:
            with contextlib.suppress(OSError):
                os.close(process)
        self._processes = {}

    def _add_up(
        self, tensors: Sequence[torch.Tensor], sums: Sequence[torch.Tensor], factor: float
    ) -> None:
        if not tensors:
            return
        _check_alike(tensors, sums)
        kinds = {_KINDS.get(tensor.dtype) for tensor in tensors}
        kind = kinds.pop()
        if kind is None or kinds:
            raise TypeError(f"cannot add up {[tensor.dtype for tensor in tensors]} over the ranks")
        self._run(kind, _pointers(tensors), _pointers(sums), _ends(sums), factor)

    def _run(
        self,
        kind: int,
        sources: Sequence[int],
        targets: Sequence[int],
        ends: Sequence[int],
        factor: float = 1.0,
    ) -> None:
        """Make an exchange; the arguments are those of ``struct exchange``.

        If a signal's handler raises an exception meanwhile, the exchange is done first, if the
        others let it: else the ranks would no longer exchange the same.
        """
        if self._mapping is None or not self._is_at_rest:
            raise RuntimeError("an exchange with the other ranks was interrupted")
        kept = self._mapping, _addresses(sources), _addresses(targets), _sizes(ends)
        exchange = _Exchange(
            self._address,
            *(self.rank, self.size, kind, torch.get_num_threads(), factor),
            *(ctypes.addressof(array) for array in kept[1:]),
            *(len(sources), 0, 0, int(LOOK_SECONDS * 1e9), 0),
        )
        self._is_at_rest = is_over = False
        try:
            failure = self._advance(exchange, MEETING_SECONDS)
            is_over = True
        finally:
            if not is_over:
                failure = self._advance(exchange, INTERRUPTED_SECONDS)
            self._is_at_rest = failure is None
        if failure is not None:
            self._lost(RuntimeError(failure))

    def _advance(self, exchange: _Exchange, seconds: float) -> str | None:
        """Go on with an exchange; returns why it cannot be done, ``None`` if it is done."""
        deadline = time.monotonic() + seconds
        dead: str | None = None
        while (status := self._kernel.advance(exchange)) != _DONE:
            if status == _LEFT:
                return "another rank has left"
            if status == _DIFFERENT:
                return "the ranks exchange different data"
            if self._mapping is None:  # by a signal's handler
                raise RuntimeError("the channel was closed in the middle of an exchange")
            if dead is not None:
                return dead
            if time.monotonic() > deadline:
                return f"another rank has not answered within {seconds:.0f} s"
            dead = self._find_dead()  # it may have answered before it died
        return None

    def _find_dead(self) -> str | None:
        """Return that a rank has died, if one has."""
        for process, _ in self._deaths.poll(0):
            return f"rank {self._processes[process]} has died"
        return self._news()


def _check_alike(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
    """Check that the bytes of tensors fit into others."""
    for source, target in zip(sources, targets, strict=True):
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError("tensors are to be copied into others that differ")


def _pointers(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return the addresses of tensors whose memory holds their elements in logical order."""
    for tensor in tensors:
        is_plain = not (tensor.is_conj() or tensor.is_neg())
        if not (is_plain and tensor.is_contiguous() and tensor.device.type == "cpu"):
            raise ValueError("a tensor is not contiguous in main memory")
    return [tensor.data_ptr() for tensor in tensors]


def _ends(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Return where each tensor ends in a row of all, in bytes."""
    return list(itertools.accumulate(tensor.nbytes for tensor in tensors))


def _addresses(values: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(values))(*values)


def _sizes(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


@functools.cache
def load_kernel() -> kernels.Library:
    """Return the compiled kernel.

    Raises:
        kernels.KernelError: it cannot be built or loaded.
    """
    kernel = kernels.load("exchange")
    kernel.mapping_bytes.restype = ctypes.c_int64
    kernel.mapping_bytes.argtypes = [ctypes.c_int]
    kernel.advance.restype = ctypes.c_int
    kernel.advance.argtypes = [ctypes.POINTER(_Exchange)]
    kernel.leave.restype = None
    kernel.leave.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return kernel


def mapping_bytes(size: int) -> int:
    """Return how many bytes of memory so many ranks share.

    Raises:
        kernels.KernelError: the kernel is not available.
    """
    return int(load_kernel().mapping_bytes(size))
