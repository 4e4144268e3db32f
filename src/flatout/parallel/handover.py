"""How the ranks of one host come to share memory: rank 0 makes it, and hands it to the others.

The memory is an anonymous file (memfd_create(2)), which goes through a socket with an abstract
address (unix(7)). Neither has a place in a file system, so nothing is left behind, whichever rank
is killed when, and processes with different views of the file system find each other.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flatout import kernels
from flatout.parallel.memory import Memory, mapping_bytes
from flatout.parallel.place import Place

MOST_RANKS = 250
"""A message carries at most 253 file descriptors (``SCM_MAX_FD`` in ``include/net/scm.h``)."""

_ADDRESS = "memory"
"""The key in the store under which the others find the socket of rank 0; empty: there is none."""

_CREDENTIALS = struct.Struct("iII")
"""``struct ucred`` of unix(7): process, user and group."""

Agree = Callable[[str, bool], bool]
"""Called by all ranks with the name of a question and an answer; returns whether all say yes."""

Wait = Callable[[Callable[[], Any]], None]
"""Returns once a condition holds."""

Connect = Callable[[int, Mapping[int, int]], Memory]
"""Makes the channel from file descriptors: of the memory, and of the process of each rank. They are
closed afterwards."""

_ANSWER_SECONDS = 10.0
"""How long rank 0 waits for what the others have sent already."""


def share_memory(
    place: Place, store: Any, agree: Agree, wait: Wait, connect: Connect
) -> Memory | None:
    """Return a channel through memory; ``None`` on all ranks if one of them cannot have it.

    Args:
        place: of this process.
        store: of keys and values, the same for all ranks.
        agree: asks all ranks.
        wait: waits for other ranks.
        connect: makes the channel.
    """
    with contextlib.ExitStack() as until_end:
        own: socket.socket | None = None
        if place.rank == 0:
            own = _listen(place.size)
            store.set(_ADDRESS, own.getsockname()[1:].decode() if own else "")
        else:
            wait(lambda: store.check([_ADDRESS]))
            own = _reach(store.get(_ADDRESS).decode(), place)
        if own is not None:
            until_end.enter_context(own)
        if not agree("can-share", own is not None) or own is None:
            return None
        channel = None
        with contextlib.suppress(OSError, kernels.KernelError):
            if place.rank == 0:
                with own:  # those that wait for an answer learn that none comes
                    channel = _hand_out(own, place, connect)
            else:
                wait(lambda: select.select([own], [], [], 0)[0])
                channel = _take(own, place, connect)
        if agree("shares", channel is not None):
            return channel
        if channel is not None:
            channel.close()
        return None


def _is_possible(size: int) -> bool:
    """Whether this process can share memory with so many ranks."""
    if size > MOST_RANKS or not (hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")):
        return False
    try:
        mapping_bytes(size)
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, kernels.KernelError):
        return False
    return True


def _listen(size: int) -> socket.socket | None:
    """Return a socket that the others can reach; ``None`` if memory cannot be shared."""
    if not _is_possible(size):
        return None
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(f"\0flatout-{secrets.token_hex(16)}")
        listener.listen(size)
    except OSError:
        listener.close()
        return None
    return listener


def _reach(address: str, place: Place) -> socket.socket | None:
    """Return a socket that is connected to that of rank 0, ``None`` if there is none."""
    if not address or not _is_possible(place.size):
        return None
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"\0{address}")
        connection.send(bytes([place.rank]))
        is_ours = _peer(connection)[1] == os.geteuid()
    except OSError:
        is_ours = False
    if not is_ours:
        connection.close()
        return None
    return connection


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return the process at the other end of a connection, and its user."""
    size = _CREDENTIALS.size
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    process, user, _ = _CREDENTIALS.unpack(credentials)
    return process, user


def _hand_out(listener: socket.socket, place: Place, connect: Connect) -> Memory:
    """Make the memory, and give it to the others, who have connected already.

    Raises:
        OSError: it cannot be made, or one of the others is not there.
        kernels.KernelError: the kernel is not available.
    """
    listener.settimeout(_ANSWER_SECONDS)
    with contextlib.ExitStack() as until_end:
        connections: list[socket.socket] = []
        processes = {place.rank: os.pidfd_open(os.getpid())}
        until_end.callback(lambda: _close(processes.values()))
        while len(processes) < place.size:
            connection = until_end.enter_context(listener.accept()[0])
            connection.settimeout(_ANSWER_SECONDS)
            process, user = _peer(connection)
            if user == os.geteuid():  # anyone can connect
                received = connection.recv(1)
                if not received:
                    raise ConnectionError("a rank has gone")
                processes[received[0]] = os.pidfd_open(process)
                connections.append(connection)
        memory = os.memfd_create("flatout-ranks")
        until_end.callback(os.close, memory)
        os.posix_fallocate(memory, 0, mapping_bytes(place.size))
        descriptors = [memory, *(processes[rank] for rank in range(place.size))]
        for connection in connections:
            socket.send_fds(connection, [b"\0"], descriptors)
        return connect(memory, processes)


def _take(connection: socket.socket, place: Place, connect: Connect) -> Memory:
    """Get the memory from rank 0.

    Raises:
        OSError: rank 0 does not give it.
        kernels.KernelError: the kernel is not available.
    """
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1 + place.size)
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        if len(descriptors) != 1 + place.size:
            raise ConnectionError("rank 0 has not sent its memory")
        memory, *processes = descriptors
        return connect(memory, dict(enumerate(processes)))
    finally:
        _close(descriptors)


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
