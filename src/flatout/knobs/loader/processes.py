"""Processes that fetch batches: forks of the program, which know of its data what it knew then."""

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

from flatout.knobs.loader.purity import Account

SLOTS = 2
"""Batches of a process that are being fetched, are to be, or wait for the program."""

SLOT_BYTES = 1 << 26
"""Shared memory for the tensors of one batch, of which it takes what it needs; tensors beyond it
go through a pipe."""

MOST_INDICES = 4096
"""Of a batch: all that is asked of a process fits into its pipe, so that no one waits for it."""

STALLED_S = 60.0
"""After which a process that owes an answer is given up."""

SETTLED_S = 2.0
"""Age of the last change from which on a file's times tell another change from it: file systems
note them in steps of up to two seconds."""

WATCH_S = 1.0
"""How often a process without work looks whether the program is still there."""

File = tuple[str, tuple[int, ...]]
"""A file, and what tells it from what it may be later."""


CHANGING = "it opens files that have changed just now"
"""What a process says of a batch that could be other files' without their times telling."""


class Answer(NamedTuple):
    """What a process says of a batch.

    Attributes:
        digest: of what its samples were made of; ``None``: there is no batch.
        files: that were read.
        packed: the batch, see ``packed``.
        why: there is none.
    """

    digest: bytes | None
    files: Sequence[File] = ()
    packed: bytes = b""
    why: str = ""


class Ticket(NamedTuple):
    """A batch that a process was asked for."""

    process: Process
    number: int
    slot: int


class Process:
    """A fork of the program, though no child of it: what waits for all children waits for none.

    Args:
        fetcher: torch's, of a loader.
        account: of its samples, as they are now.
        seed: of its random numbers.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, fetcher: Any, account: Account, seed: int) -> None:
        self._number = 0
        self._memory = mmap.mmap(-1, SLOTS * SLOT_BYTES)
        self.free = list(range(SLOTS))
        self._connection, theirs = Pipe()
        self._line = os.fstat(self._connection.fileno())
        program = os.getpid()
        between = os.fork()
        if between == 0:
            try:
                if os.fork() == 0:
                    self._connection.close()
                    for other in list(_all):
                        other._connection.close()
                    _serve(theirs, self._memory, fetcher, account, seed, program)
            finally:
                os._exit(0)
        theirs.close()
        _all.add(self)
        with contextlib.suppress(ChildProcessError):  # the program waits for all that end
            os.waitpid(between, 0)

    def ask(self, indices: Sequence[int]) -> Ticket:
        """Let it fetch a batch into a slot that is free.

        Raises:
            OSError: it has ended.
        """
        self._number += 1
        ticket = Ticket(self, self._number, self.free.pop())
        self._check_line()
        self._connection.send((ticket.number, ticket.slot, list(indices)))
        return ticket

    def take(self, ticket: Ticket) -> Answer:
        """What it says of a batch, which it is waited for.

        Raises:
            EOFError, OSError: it has ended.
            TimeoutError: it does not answer.
        """
        while True:
            self._check_line()
            if not self._connection.poll(STALLED_S):
                raise TimeoutError(f"a process has not answered for {STALLED_S} s")
            number, answer = self._connection.recv()
            if number == ticket.number:  # those before it, no one asks for any more
                return Answer(*answer)

    def taken(self, ticket: Ticket, answer: Answer) -> Any:
        """The batch of an answer; its slot is free again."""
        at = ticket.slot * SLOT_BYTES
        batch = _Unpacker(answer.packed, memoryview(self._memory)[at : at + SLOT_BYTES]).load()
        self.free.append(ticket.slot)
        return batch

    def forget(self) -> None:
        """No one asks for what it owes any more: it does that before anything else."""
        self.free = list(range(SLOTS))

    def end(self) -> None:
        """Hang up: it ends with what it is at."""
        _all.discard(self)
        try:
            self._check_line()
            self._connection.close()
        except OSError:
            self._connection._handle = None  # type: ignore[attr-defined]  # not ours to close

    def _check_line(self) -> None:
        """A program may close what it has not opened, and open something else in its place.

        Raises:
            OSError: it has.
        """
        if not os.path.samestat(self._line, os.fstat(self._connection.fileno())):
            raise OSError("the program has closed the line to a process")


_all: weakref.WeakSet[Process] = weakref.WeakSet()
"""A fork has the connections to the others too, and would keep them open."""


def _serve(
    connection: Connection,
    memory: mmap.mmap,
    fetcher: Any,
    account: Account,
    seed: int,
    program: int,
) -> None:
    """Fetch what is asked for, until the program hangs up.

    Raises:
        ProcessLookupError: the program has ended, and a fork of it has the line.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program decides what ends it
    signal.set_wakeup_fd(-1)
    gc.freeze()  # what the program has left to collect is not ended a second time here
    torch.set_num_threads(1)  # those of OpenMP are not there after a fork
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % (1 << 32))
    warnings.simplefilter("error")  # the program's process warns itself
    opened: list[File | None] = []
    sys.addaudithook(lambda event, args: opened.append(_file(*args)) if event == "open" else None)
    while True:
        while not connection.poll(WATCH_S):
            os.kill(program, 0)
        try:
            number, slot, indices = connection.recv()
        except EOFError:
            return
        opened.clear()
        signal.alarm(2 * int(STALLED_S))  # ends it
        try:
            digest = account.digest(indices)
            batch = fetcher.fetch(indices)
            part = memoryview(memory)[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES]
            answer = Answer(digest, [file for file in opened if file], packed(batch, part))
            if None in opened:
                answer = Answer(None, why=CHANGING)
        except Exception as error:  # noqa: BLE001 - the program meets it when it fetches the batch
            answer = Answer(None, why=f"{type(error).__name__}: {error}")
        signal.alarm(0)
        connection.send((number, tuple(answer)))


def _file(path: Any, mode: Any, flags: int) -> File | None:
    """A file that is opened; ``None``: what is read from it is not known."""
    if not isinstance(path, str) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return None
    path = os.path.abspath(path)
    state = state_of(path)
    is_settled = state is not None and time.time() - max(state[3:]) / 1e9 > SETTLED_S
    return (path, state) if state is not None and is_settled else None


def state_of(path: str) -> tuple[int, ...] | None:
    """Device, inode, size and times of last change (ns) of a file; ``None``: it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    times = status.st_mtime_ns, status.st_ctime_ns
    return (status.st_dev, status.st_ino, status.st_size, *times)


# A batch on its way


def packed(batch: Any, memory: memoryview) -> bytes:
    """A batch, pickled; its tensors lie in ``memory``, as far as they fit.

    Raises:
        Exception: it has something in it that cannot be pickled.
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
            raise TypeError("a batch has a tensor that belongs to this process")
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

    def persistent_load(self, found: Any) -> torch.Tensor:
        kind, *how = found
        if kind == "saved":
            loaded: torch.Tensor = torch.load(io.BytesIO(how[0]))
            return loaded
        dtype, begin, elements, size, stride = how
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
