"""Exchanges between two ranks through shared memory against gloo, interleaved.

    python benchmarks/exchange.py [--pairs 15] [--threads 1]

Both ranks have both channels, which take turns in blocks of exchanges. Shown are medians over the
blocks, with the middle half of them, and the ratio of the medians. Exits with 1 if the sum of
32 MiB is not ten times as fast. Run it on a machine that does nothing else, with at least two
cores: who waits for a rank waits for its core too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from flatout.intercept.events import EventLog
from flatout.machine import cores
from flatout.parallel import joining
from flatout.parallel.channel import Channel
from flatout.parallel.ending import Ending
from flatout.parallel.place import Place
from flatout.wire.writer import RecordWriter

RANKS = 2
MIB = 1 << 20
ASKED = {"sum, 32 MiB": 10.0}
"""How many times as fast as gloo an exchange is to be."""


class Case(NamedTuple):
    """An exchange, and how many of them make a block."""

    name: str
    exchange: Callable[[Channel], object]
    count: int


def cases() -> list[Case]:
    """What is measured."""
    header = bytes(64)
    statistics_of_norm = torch.zeros(257, dtype=torch.float64)
    numbers = {mib: torch.zeros(mib * MIB // 4) for mib in (1, 4, 32)}
    rows = [[torch.empty_like(numbers[4])] for _ in range(RANKS)]
    return [
        Case("meeting, 64 bytes", lambda channel: channel.meet(header), 200),
        Case("sum, 257 doubles", lambda channel: channel.sum([statistics_of_norm]), 200),
        *(
            Case(f"sum, {mib} MiB", lambda channel, x=x: channel.sum([x]), 32 // mib)
            for mib, x in numbers.items()
        ),
        Case("mean, 32 MiB", lambda channel: channel.average([numbers[32]], [numbers[32]]), 1),
        Case("no exchange, 32 MiB", lambda _: numbers[32].mul_(1.0), 1),
        Case("gathering, 4 MiB", lambda channel: channel.gather([numbers[4]], rows), 8),
    ]


def block_us(case: Case, channel: Channel) -> float:
    """Microseconds of an exchange, after a meeting at which both ranks begin."""
    channel.meet(b"start")
    start = time.perf_counter()
    for _ in range(case.count):
        case.exchange(channel)
    return (time.perf_counter() - start) * 1e6 / case.count


def measure(rank: int, pairs: int, folder: Path) -> int:
    """Be one of the ranks. Rank 0 prints the figures, and returns 1 if one is too low."""
    place = Place(rank, RANKS, folder)
    ending = Ending(place, EventLog(RecordWriter(folder, os.getpid())), lambda reason: None)
    channels = [
        joining.join(place, ending, may_share_memory=shares).channel for shares in (True, False)
    ]
    status = 0
    for case in cases():
        times_us: list[list[float]] = [[], []]
        for channel in channels:
            block_us(case, channel)  # not counted
        for pair in range(pairs):
            for which in (0, 1) if pair % 2 else (1, 0):
                times_us[which].append(block_us(case, channels[which]))
        if rank == 0:
            memory, gloo = times_us
            ratio = statistics.median(gloo) / statistics.median(memory)
            print(f"{case.name:18} {shown(memory):>30} {shown(gloo):>30} {ratio:8.1f}", flush=True)
            status |= ratio < ASKED.get(case.name, 0.0)
    for channel in channels:
        channel.close()
    return status


def shown(times_us: list[float]) -> str:
    """The median and the middle half."""
    low, middle, high = statistics.quantiles(times_us, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="of blocks (15)")
    parser.add_argument("--threads", type=int, default=1, help="of each rank (1)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        torch.set_num_threads(arguments.threads)
        shares = cores.share_out(cores.nodes(cores.allowed_processors()), RANKS)
        os.sched_setaffinity(0, shares[arguments.rank])
        return measure(arguments.rank, arguments.pairs, arguments.folder)
    print(f"{RANKS} ranks, torch {torch.__version__}, load average {os.getloadavg()[0]:.1f}")
    print(f"{'microseconds':18} {'shared memory':>30} {'gloo':>30}    ratio")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(RANKS)]
        return max(abs(rank.wait()) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main())
