"""Exchanges between two ranks through shared memory against gloo, interleaved.

    python benchmarks/exchange.py [--rounds 15] [--threads 1]

Both ranks have both channels, and take turns with them: in each round, one block of each, in an
order that changes. Shown are medians over the rounds and the range of their middle half. Exits with
1 if the sum of 32 MiB is not ten times as fast. Run it on a machine that does nothing else: each
rank needs cores of its own.
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
from flatout.parallel import joining
from flatout.parallel.channel import Channel
from flatout.parallel.ending import Ending
from flatout.parallel.place import Place
from flatout.wire.writer import RecordWriter

MIB = 1 << 20
ASKED_RATIO = 10.0
"""How many times as fast as gloo the sum of 32 MiB is to be."""


class Case(NamedTuple):
    """What is exchanged, and how often in a block."""

    name: str
    exchange: Callable[[Channel], object]
    repeats: int


def cases(size: int) -> list[Case]:
    """What is measured."""
    header = bytes(64)
    numbers = {mib: torch.ones(mib * MIB // 4) for mib in (1, 4, 32)}
    few = torch.ones(257, dtype=torch.float64)
    rows = [[torch.empty_like(numbers[4])] for _ in range(size)]
    return [
        Case("meeting of 64 bytes", lambda channel: channel.meet(header), 200),
        Case("sum of 257 doubles", lambda channel: channel.sum([few]), 200),
        *(
            Case(f"mean of {mib} MiB", lambda channel, x=x: channel.average([x], [x]), 64 // mib)
            for mib, x in numbers.items()
        ),
        Case("gathering 4 MiB", lambda channel: channel.gather([numbers[4]], rows), 16),
    ]


def measure(rank: int, rounds: int, folder: Path) -> None:
    """Be one of the ranks; rank 0 prints what it has measured."""
    place = Place(rank, 2, folder)
    events = EventLog(RecordWriter(folder, os.getpid()))
    ending = Ending(place, events, lambda reason: None)
    channels = [joining.join(place, ending, may_share_memory=shares) for shares in (True, False)]
    for case in cases(2):
        times_us: list[list[float]] = [[], []]
        for number in range(-1, rounds):
            for which in (0, 1) if number % 2 else (1, 0):
                channel = channels[which]
                channel.meet(bytes(64))
                start = time.perf_counter()
                for _ in range(case.repeats):
                    case.exchange(channel)
                elapsed_us = (time.perf_counter() - start) * 1e6 / case.repeats
                if number >= 0:
                    times_us[which].append(elapsed_us)
        if rank == 0:
            memory, gloo = map(shown, times_us)
            ratio = statistics.median(times_us[1]) / statistics.median(times_us[0])
            print(f"{case.name:20} {memory:>28} {gloo:>28} {ratio:8.1f}x", flush=True)
            if case.name == "mean of 32 MiB" and ratio < ASKED_RATIO:
                print(f"less than {ASKED_RATIO:.0f} times as fast as gloo")
                os._exit(1)
    for channel in channels:
        channel.close()


def shown(times_us: list[float]) -> str:
    """Median and middle half, in microseconds."""
    low, middle, high = statistics.quantiles(times_us, n=4)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="blocks of each (15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of a rank (1)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        torch.set_num_threads(arguments.threads)
        cores = sorted(os.sched_getaffinity(0))
        half = len(cores) // 2
        os.sched_setaffinity(0, cores[half:] if arguments.rank else cores[:half] or cores)
        measure(arguments.rank, arguments.rounds, arguments.folder)
        return 0
    print(f"torch {torch.__version__}, load {os.getloadavg()[0]:.1f}, microseconds")
    print(f"{'':20} {'shared memory':>28} {'gloo':>28}    ratio")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--rank"]
        ranks = [subprocess.Popen([*command, str(rank)]) for rank in range(2)]
        return max(abs(process.wait()) for process in ranks)


if __name__ == "__main__":
    sys.exit(main())
