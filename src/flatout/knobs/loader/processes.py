"""Processes that fetch batches: forks of the program with its data as they were at the fork."""

from __future__ import annotations

import contextlib
import gc
import io
import mmap
import os
import pickle
import random
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, NamedTuple

import torch

from flatout.intercept.purity import Account

SLOTS = 2
"""Maximum number of batches that each process fetches or keeps ready for the program."""

SLOT_BYTES = 1 << 26
"""The shared address space for the tensors of one batch; memory is used only as needed, and tensors
that do not fit are sent through a pipe."""

MOST_INDICES = 4096
"""Maximum number of samples of a batch; all requests to a process then fit into its pipe, so
sending them never blocks."""

STALLED_S = 60.0
"""A process that does not answer for this long is given up."""

SETTLED_S = 2.0
"""Once a file's last change is older than this, a later change is sure to change its times: file
systems record times in steps of up to two seconds."""

WATCH_S = 1.0
"""Interval at which a process without work checks that the program is still running."""

File = tuple[str, tuple[int, ...]]
"""The path of a file, and what ``state_of`` returned for it."""

CHANGING = "it opens files that have just been changed"
"""Why a process returns no batch: the times of its files could not show a further change."""


class Answer(NamedTuple):
    """A process's answer to the request for a batch.

    Attributes:
        digest: the digest of the data that its samples depend on; ``None``: there is no batch.
        files: the files that were read.
        packed: the batch, see ``pack``.
        why: why there is no batch.
    """

    digest: bytes | None
    files: Sequence[File] = ()
    packed: bytes = b""
    why: str = ""


class Ticket(NamedTuple):
    """A request for a batch.

    Attributes:
        process: the process that fetches it.
        number: the number of the request.
        slot: the slot in the shared memory for its tensors.
    """

    process: Process
    number: int
    slot: int


class Process:
    """A fork of the program that fetches batches.

    It is forked twice, so that it is no child of the program and the program never waits for it.

    Args:
        fetcher: the fetcher of torch's loader.
        account: what its samples depend on now.
        seed: the seed of the process's random number generators.

    Attributes:
        free_slots: the slots of its shared memory that are not in use.

    Raises:
        OSError: it cannot be forked.
    """

    def __init__(self, fetcher: Any, account: Account, seed: int) -> None:
        self._number = 0
        self._memory = mmap.mmap(-1, SLOTS * SLOT_BYTES)
        self.free_slots = list(range(SLOTS))
        self._connection, other_end = Pipe()
        self._pipe_status = os.fstat(self._connection.fileno())
        program_pid = os.getpid()
        child_pid = os.fork()
        if child_pid == 0:
            try:
                if os.fork() == 0:
                    self._connection.close()
                    for other in list(_processes):
                        other._connection.close()
                    _serve(other_end, self._memory, fetcher, account, seed, program_pid)
            finally:
                os._exit(0)
        other_end.close()
        _processes.add(self)
        with contextlib.suppress(ChildProcessError):  # the program may have waited for it already
            os.waitpid(child_pid, 0)

    def request(self, indices: Sequence[int]) -> Ticket:
        """Let the process fetch a batch into a free slot.

        Raises:
            OSError: the process has ended.
        """
        self._number += 1
        ticket = Ticket(self, self._number, self.free_slots.pop())
        self._check_connection()
        self._connection.send((ticket.number, ticket.slot, list(indices)))
        return ticket

    def receive(self, ticket: Ticket) -> Answer:
        """Wait for the answer to a request.

        Raises:
            EOFError, OSError: the process has ended.
            TimeoutError: it does not answer.
        """
        while True:
            self._check_connection()
            if not self._connection.poll(STALLED_S):
                raise TimeoutError(f"a process has not answered for {STALLED_S} s")
            number, answer = self._connection.recv()
            if number == ticket.number:  # answers to earlier requests have been given up
                return Answer(*answer)

    def unpack(self, ticket: Ticket, answer: Answer) -> Any:
        """The batch of an answer; this frees its slot."""
        begin = ticket.slot * SLOT_BYTES
        memory = memoryview(self._memory)[begin : begin + SLOT_BYTES]
        batch = _Unpacker(answer.packed, memory).load()
        self.free_slots.append(ticket.slot)
        return batch

    def forget_requests(self) -> None:
        """Give up all requests; the process still answers them before later ones."""
        self.free_slots = list(range(SLOTS))

    def end(self) -> None:
        """Close the connection; the process ends when it has finished its present batch."""
        _processes.discard(self)
        try:
            self._check_connection()
            self._connection.close()
        except OSError:
            self._connection._handle = None  # type: ignore[attr-defined]  # closed by the program

    def _check_connection(self) -> None:
        """Check that the connection's file descriptor still belongs to its pipe.

        Raises:
            OSError: the program has closed the descriptor, and perhaps opened another file there.
        """
        if not os.path.samestat(self._pipe_status, os.fstat(self._connection.fileno())):
            raise OSError("the program has closed the connection to a process")


_processes: weakref.WeakSet[Process] = weakref.WeakSet()
"""All processes; a fork inherits the connections to the others, and must close them."""


def _serve(
    connection: Connection,
    memory: mmap.mmap,
    fetcher: Any,
    account: Account,
    seed: int,
    program_pid: int,
) -> None:
    """Answer requests until the program closes the connection.

    Raises:
        ProcessLookupError: the program has ended, but a fork of it still has the connection.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides what ends it
    signal.set_wakeup_fd(-1)
    gc.freeze()  # finalisers of the program's garbage must not run here as well
    torch.set_num_threads(1)  # OpenMP's threads do not exist after a fork
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % (1 << 32))
    warnings.simplefilter("error")  # the program then fetches the batch, and gets the warning
    opened: list[File | None] = []
    sys.addaudithook(
        lambda event, args: opened.append(_opened_file(*args)) if event == "open" else None
    )
    while True:
        while not connection.poll(WATCH_S):
            os.kill(program_pid, 0)
        try:
            number, slot, indices = connection.recv()
        except EOFError:
            return
        opened.clear()
        signal.alarm(2 * int(STALLED_S))  # ends this process
        try:
            digest = account.digest(indices)
            batch = fetcher.fetch(indices)
            slot_memory = memoryview(memory)[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
            answer = Answer(digest, [file for file in opened if file], pack(batch, slot_memory))
            if None in opened:
                answer = Answer(None, why=CHANGING)
        except Exception as error:  # noqa: BLE001 - the program gets it when it fetches the batch
            answer = Answer(None, why=f"{type(error).__name__}: {error}")
        signal.alarm(0)
        connection.send((number, tuple(answer)))


def _opened_file(path: Any, mode: Any, flags: int) -> File | None:
    """The file of an ``open`` audit event; ``None`` if its content could change unnoticed."""
    if not isinstance(path, str) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return None
    path = os.path.abspath(path)
    state = state_of(path)
    is_settled = state is not None and time.time() - max(state[3:]) / 1e9 > SETTLED_S
    return (path, state) if state is not None and is_settled else None


def state_of(path: str) -> tuple[int, ...] | None:
    """Device, inode, size in bytes and times of last change in ns; ``None``: there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times)


# Sending a batch


def pack(batch: Any, memory: memoryview) -> bytes:
    """Pickle a batch, and copy its tensors to ``memory`` as far as they fit.

    Raises:
        Exception: the batch contains something that cannot be pickled.
    """
    packer = _Packer(memory)
    packer.dump(batch)
    return packer.file.getvalue()


class _Packer(pickle.Pickler):
    def __init__(self, memory: memoryview) -> None:
        self.file = io.BytesIO()
        super().__init__(self.file, pickle.HIGHEST_PROTOCOL)
        self._memory = memory
        self._at = 0

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        if type(value) is not torch.Tensor or value.requires_grad or not value.is_cpu:
            raise TypeError("a batch contains a tensor that cannot be sent to another process")
        value = value.detach().resolve_conj().resolve_neg()
        size, stride = tuple(value.shape), value.stride()
        elements = 1 + sum((s - 1) * step for s, step in zip(size, stride, strict=True))
        begin = -(-self._at // 64) * 64
        end = begin + elements * value.itemsize
        if not value.numel() or end > len(self._memory):
            content = io.BytesIO()
            torch.save(value.clone(), content)
            return "saved", content.getvalue()
        self._at = end
        _in_memory(self._memory, value.dtype, begin, elements, size, stride).copy_(value)
        return "shared", value.dtype, begin, elements, size, stride


class _Unpacker(pickle.Unpickler):
    def __init__(self, content: bytes, memory: memoryview) -> None:
        super().__init__(io.BytesIO(content))
        self._memory = memory

    def persistent_load(self, persistent_id: Any) -> torch.Tensor:
        kind, *arguments = persistent_id
        if kind == "saved":
            loaded: torch.Tensor = torch.load(io.BytesIO(arguments[0]))
            return loaded
        dtype, begin, elements, size, stride = arguments
        return torch.empty_strided(size, stride, dtype=dtype, device="cpu").copy_(
            _in_memory(self._memory, dtype, begin, elements, size, stride)
        )


def _in_memory(
    memory: memoryview,
    dtype: torch.dtype,
    begin: int,
    elements: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
) -> torch.Tensor:
    flat = torch.frombuffer(memory, dtype=dtype, count=elements, offset=begin)
    return flat.as_strided(size, stride)
