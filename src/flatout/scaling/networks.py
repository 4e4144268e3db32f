"""Networks, and how long the ranks take to exchange tensors over them.

A message takes ``latency + bytes * seconds_per_byte`` (Hockney, "The communication challenge for
MPP", Parallel Computing 20, 1994). What collective operations take then is in Thakur, Rabenseifner
and Gropp, "Optimization of Collective Communication Operations in MPICH", International Journal of
High Performance Computing Applications 19(1), 2005, sections 4.1 (all-gather) and 4.4 (all-reduce).
What adding up takes is part of the rate.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from flatout.errors import UserError

Array = npt.NDArray[np.float64]

Algorithm = Literal["ring", "best"]
"""``ring``: what gloo does (``gloo/allgather.cc``, ``gloo/allreduce.cc``). ``best``: the fastest of
those that MPI libraries and NCCL choose from."""

HERE = "here"
"""The name of the network of this host, which is measured."""


@dataclass(frozen=True)
class Network:
    """A network, on which every rank reaches every other one alike.

    Attributes:
        name: for the user.
        latency_s: of a message, without its bytes.
        seconds_per_byte: of a message, in one direction.
        error: the relative standard error of both.
        processors: those of the one host that all ranks share; ``None``: each rank has processors
            of its own, as many as it computes with.
        is_copied: whether these processors copy the bytes, so that exchanges take turns on them.
    """

    name: str
    latency_s: float
    seconds_per_byte: float
    error: float
    processors: int | None = None
    is_copied: bool = True

    def scaled(self, latency: float, rate: float) -> Network:
        """Return the network with other figures: these times its own."""
        return replace(
            self,
            latency_s=self.latency_s * latency,
            seconds_per_byte=self.seconds_per_byte * rate,
        )


@dataclass(frozen=True)
class Software:
    """What an exchange takes on any network, measured on this host.

    Attributes:
        call_s: an exchange, for flatout, torch and gloo.
        header_s: to read the header of one rank, in a meeting.
        error: the relative standard error of both.
    """

    call_s: float
    header_s: float
    error: float


_INSTALLATIONS_DIFFER = 0.25
"""Relative standard error of the figures of a named network: they are those of good installations,
and switches, cables and settings differ."""

_TYPED = 0.1
"""Relative standard error of figures that a user gives, as they are rounded."""

_TCP_LATENCY_S = 21e-6
"""One way between two applications over 10-gigabit Ethernet: Hurwitz and Feng, "Initial End-to-End
Performance Evaluation of 10-Gigabit Ethernet", IEEE Hot Interconnects 2003. Nearly all of it is
spent in the hosts, so it is taken for faster Ethernet as well."""

_TCP_SHARE = 1448 / 1538
"""Of the bits on the wire, those that a user of TCP gets: 1,448 bytes of each frame of 1,500 bytes,
which takes 1,538 with preamble, header, checksum and gap (IEEE 802.3; RFC 9293; RFC 7323)."""

_LL128_SHARE = 120 / 128
"""Of the bytes on the wire, those that a user of NCCL's protocol LL128 gets. This and the latencies
of a step of its ring are in NCCL's own model, ``src/graph/tuning.cc``."""

_RDMA_LATENCY_S = 4.0e-6
_NVLINK_LATENCY_S = 1.9e-6


def _preset(name: str, latency_s: float, gigabits_per_s: float, share: float) -> Network:
    return Network(name, latency_s, 8 / (gigabits_per_s * 1e9 * share), _INSTALLATIONS_DIFFER)


PRESETS = {
    network.name.lower(): network
    for network in (
        _preset("10GbE", _TCP_LATENCY_S, 10, _TCP_SHARE),
        _preset("25GbE", _TCP_LATENCY_S, 25, _TCP_SHARE),
        _preset("100GbE", _TCP_LATENCY_S, 100, _TCP_SHARE),
        _preset("HDR", _RDMA_LATENCY_S, 200, _LL128_SHARE),
        _preset("NDR", _RDMA_LATENCY_S, 400, _LL128_SHARE),
        _preset("NVLink", _NVLINK_LATENCY_S, 3600, _LL128_SHARE),
    )
}
"""Named networks, one link for each rank: Ethernet with TCP; InfiniBand HDR and NDR with four lanes
(InfiniBand Trade Association, roadmap: 200 and 400 Gb/s); NVLink 4 (NVIDIA H100 data sheet:
900 GB/s, half of it in each direction)."""

_TIMES_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_RATES = {"Mb/s": 1e6 / 8, "Gb/s": 1e9 / 8, "MB/s": 1e6, "GB/s": 1e9}
"""Bytes a second."""

_FIGURES = re.compile(r"([\d.]+)(ns|us|ms|s),([\d.]+)([MG][bB]/s)")


def parse(text: str) -> Network | None:
    """Return a network from a word of the command line; ``None``: this host's, to be measured.

    Args:
        text: a name, or latency and rate such as ``25us,1.2GB/s``.

    Raises:
        UserError: it is neither.
    """
    if text.lower() == HERE:
        return None
    if text.lower() in PRESETS:
        return PRESETS[text.lower()]
    match = _FIGURES.fullmatch(text)
    try:
        if match is not None and float(match[1]) > 0 and float(match[3]) > 0:
            latency_s = float(match[1]) * _TIMES_S[match[2]]
            return Network(text, latency_s, 1 / (float(match[3]) * _RATES[match[4]]), _TYPED)
    except ValueError:  # such as 1.2.3
        pass
    names = ", ".join([HERE, *(network.name for network in PRESETS.values())])
    raise UserError(
        f"{text!r} is no network: it is one of {names}, or a latency and a rate such as "
        "25us,1.2GB/s"
    )


def gather_s(network: Network, ranks: Array, size_bytes: Array, algorithm: Algorithm) -> Array:
    """Return how long an all-gather takes, in seconds.

    Args:
        network: between the ranks.
        ranks: numbers of ranks.
        size_bytes: for each of them, the size of what every rank has in the end.
        algorithm: how it is done. Both send each byte once; Bruck's needs a logarithmic number of
            messages.
    """
    messages = ranks - 1
    if algorithm == "best":
        messages = np.ceil(np.log2(ranks))
    sent = (ranks - 1) / ranks * size_bytes
    time_s: Array = messages * network.latency_s + sent * network.seconds_per_byte
    return time_s


def sum_s(network: Network, ranks: Array, size_bytes: Array, algorithm: Algorithm) -> Array:
    """Return how long an all-reduce takes, in seconds.

    Args:
        network: between the ranks.
        ranks: numbers of ranks.
        size_bytes: of what is added up.
        algorithm: how it is done. The best is a ring, or recursive halving and doubling
            (Rabenseifner) for long, or recursive doubling for short messages. For numbers of ranks
            that are no powers of two, these send everything twice more.
    """
    latency_s, byte_s = network.latency_s, network.seconds_per_byte
    halves = 2 * (ranks - 1) / ranks * size_bytes * byte_s
    time_s: Array = 2 * (ranks - 1) * latency_s + halves
    if algorithm == "ring":
        return time_s
    rounds = np.floor(np.log2(ranks))
    is_power = 2**rounds == ranks
    extra_s = np.where(is_power, 0.0, 2 * (latency_s + size_bytes * byte_s))
    inside = 2**rounds
    long_s = 2 * rounds * latency_s + 2 * (inside - 1) / inside * size_bytes * byte_s + extra_s
    short_s = rounds * (latency_s + size_bytes * byte_s) + extra_s
    best_s: Array = np.minimum(time_s, np.minimum(long_s, short_s))
    return best_s
