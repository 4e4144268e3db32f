"""How the ranks of a job find each other: by tickets, an address and a port in the run directory.

A job may consist of several processes, and any of them may train. The k-th process of a rank that
makes a root call takes ticket k, and meets those that hold ticket k of the other ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flatout.parallel import devices
from flatout.parallel.channel import MEETING_SECONDS, Channel, Group
from flatout.parallel.ending import Ending
from flatout.parallel.handover import share_memory
from flatout.parallel.memory import Memory
from flatout.parallel.place import Place

JOIN_SECONDS = 600.0
"""How long a rank waits for the others at the first root call; they may still load their data."""

_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Connection:
    """The connection to the other ranks.

    Attributes:
        channel: for messages, and for tensors in main memory: through shared memory if all ranks
            can have it, else over gloo.
        connect: called by all ranks at the same time with the device of some tensors; returns the
            channels of ``devices.connect``, or two over gloo.
    """

    channel: Channel
    connect: Callable[[torch.device], list[Group]]


def join(place: Place, ending: Ending, *, may_share_memory: bool = True) -> Connection:
    """Meet the other ranks.

    Args:
        place: of this process.
        ending: stops this process.
        may_share_memory: whether the channel may be other than gloo.

    Raises:
        RuntimeError: a rank has not come in time, or torch has no gloo.
    """
    ending.ticket = ticket = take_ticket(place)
    port_file = place.run_directory / f"port-{ticket}"
    deadline = time.monotonic() + JOIN_SECONDS
    if place.rank == 0:
        store = _store(place.address, 0, is_server=True)
        new = port_file.with_name(f"{port_file.name}.new")
        new.write_text(f"{place.address} {store.port}")
        new.rename(port_file)
    else:
        _wait_until(port_file.exists, deadline, ending)
        address, port = port_file.read_text().split()
        store = _store(address, int(port), is_server=False)

    def wait(condition: Callable[[], Any]) -> None:
        _wait_until(condition, deadline, ending)

    def agree(question: str, answer: bool) -> bool:
        store.set(f"{question}-{place.rank}", str(int(answer)))
        keys = [f"{question}-{rank}" for rank in range(place.size)]
        wait(lambda: store.check(keys))
        return all(store.get(key) == b"1" for key in keys)

    def connect(memory: int, processes: Mapping[int, int]) -> Memory:
        return Memory(memory, processes, place.rank, place.size, ending.lost, ending.news)

    agree("here", True)
    channel: Channel | None = None
    if may_share_memory and place.has_common_directory:
        channel = share_memory(place, store, agree, wait, connect)
    if channel is None:
        with _silent(1):  # gloo says there that it is connected
            channel = _over_gloo(store, place, ending)
    channel.meet(b"\0")
    over_gloo: list[Group] = []
    if isinstance(channel, Group):
        from torch import distributed

        beside: Any = distributed.PrefixStore("beside", store)  # type: ignore[attr-defined]
        with _silent(1):
            over_gloo = [channel, _over_gloo(beside, place, ending)]

    def connect_device(device: torch.device) -> list[Group]:
        if device.type == "cpu":
            return over_gloo
        return devices.connect(device, channel, store, ending.lost)

    return Connection(channel, connect_device)


def _over_gloo(store: Any, place: Place, ending: Ending) -> Group:
    return Group(_group(store, place), place.rank, place.size, ending.lost)


def take_ticket(place: Place) -> int:
    """Return how many processes of this rank have made a root call before this one."""
    for ticket in itertools.count():
        path = place.run_directory / f"ticket-{place.rank}-{ticket}"
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return ticket
    raise AssertionError


def _wait_until(condition: Any, deadline: float, ending: Ending) -> None:
    while not condition():
        absence = ending.absence()
        if absence is not None:
            ending.stop(absence)
        if time.monotonic() > deadline:
            raise RuntimeError(f"a rank has made no root call within {JOIN_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


def _store(address: str, port: int, is_server: bool) -> Any:
    timeout = datetime.timedelta(seconds=JOIN_SECONDS)
    from torch import distributed

    new_store: Any = distributed.TCPStore  # type: ignore[attr-defined]
    with _silent(2):  # it warns there of addresses that no name service knows
        return new_store(address, port, None, is_server, timeout, False)


def _group(store: Any, place: Place) -> Any:
    """Return a process group that ``torch.distributed`` does not know of."""
    from torch._C._distributed_c10d import ProcessGroupGloo

    gloo: Any = ProcessGroupGloo
    options = gloo._Options()
    options._timeout = datetime.timedelta(seconds=MEETING_SECONDS)
    options._devices = _devices(gloo, place.address)
    return gloo(store, place.rank, place.size, options)


def _devices(gloo: Any, address: str) -> list[Any]:
    """Return what gloo listens on: the interfaces that the user has named, as torch itself takes
    them, or the address at which the other ranks reach this one."""
    names = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if names and address != Place.address:
        return [gloo.create_device(interface=name) for name in names.split(",")]
    return [gloo.create_device(hostname=address)]


@contextlib.contextmanager
def _silent(descriptor: int) -> Iterator[None]:
    """A context in which what C++ prints on standard output (1) or error (2) is dropped."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        (sys.stdout if descriptor == 1 else sys.stderr).flush()
    libc.fflush(None)
    try:
        kept = os.dup(descriptor)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), descriptor)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, descriptor)
        os.close(kept)
