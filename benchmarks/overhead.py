"""What watching costs: the same program bare and under ``flatout run``, step against step.

    python benchmarks/overhead.py [--pairs 8]

Two living processes on one core, the bare command and the watched one, take turns: a block of steps
here, the same block there, so that both meet the same speed of the machine. The difference of the
mean step (by the program's own clock) is taken over all blocks of a pair of processes; its 95 %
confidence interval is over the pairs, since each process has a memory layout of its own. Steps of
about 1, 10 and 100 ms; allowed are 20 microseconds and 0.5 % of the step. Exits with 1 if the mean
is above what is allowed or known no finer than that. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ALLOWED_US = 20.0
ALLOWED_SHARE = 0.005

PROGRAM = """
import sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Net(nn.Module):
    def __init__(self, turns):
        super().__init__()
        self.turns = turns
        self.first = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64)
        self.last = nn.Linear(64, 10)

    def forward(self, x):
        x = self.first(x)
        for _ in range(self.turns):
            x = torch.tanh(self.again(x))
        return self.last(x)

turns, block = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(1)
net = Net(turns)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
data = TensorDataset(torch.randn(16 * block, 64), torch.randint(0, 10, (16 * block,)))
loss_function = nn.CrossEntropyLoss()
for _ in sys.stdin:
    batches = iter(DataLoader(data, batch_size=16))
    start = time.perf_counter()
    for x, y in batches:
        loss = loss_function(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print((time.perf_counter() - start) / block * 1e6, flush=True)
"""


STEADY_HEAP = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}
"""For both sides: without it glibc returns memory in one process and keeps it in the next, as the
heap happens to lie, which moves a 10 ms step by 2 ms."""


class Size(NamedTuple):
    """One length of step: the network's turns, the steps of a block, the blocks of a process."""

    turns: int
    block: int
    blocks: int


SIZES = {"1 ms": Size(4, 100, 60), "10 ms": Size(80, 20, 60), "100 ms": Size(800, 4, 50)}


class Loop:
    """The program as a living process that does a block of steps when asked."""

    def __init__(self, folder: Path, size: Size, watched: bool) -> None:
        command = [sys.executable, str(folder / "program.py"), str(size.turns), str(size.block)]
        if watched:
            command = [sys.executable, "-m", "flatout", "run", "--", *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **STEADY_HEAP, "FLATOUT_HOME": str(folder / "home")},
        )

    def step_us(self) -> float:
        """Mean step of the next block in microseconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


def pair_us(folder: Path, size: Size) -> tuple[float, float]:
    """One pair of processes: the bare step, and what watching adds to it, in microseconds."""
    bare, watched = Loop(folder, size, watched=False), Loop(folder, size, watched=True)
    for loop in (bare, watched) * 5:
        loop.step_us()
    bare_us, added_us = [], []
    for turn in range(size.blocks):
        order = (bare, watched) if turn % 2 == 0 else (watched, bare)
        times = {loop: loop.step_us() for loop in order}
        bare_us.append(times[bare])
        added_us.append(times[watched] - times[bare])
    bare.end()
    watched.end()
    return statistics.median(bare_us), statistics.fmean(added_us)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    arguments = parser.parse_args()
    from scipy import stats

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # two cores differ by some percent
    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(PROGRAM)
        for label, size in SIZES.items():
            pairs = [pair_us(folder, size) for _ in range(arguments.pairs)]
            bare = statistics.fmean(bare for bare, _ in pairs)
            added = [added for _, added in pairs]
            mean = statistics.fmean(added)
            half = stats.t.ppf(0.975, len(added) - 1) * stats.sem(added)
            allowed = ALLOWED_US + ALLOWED_SHARE * bare
            failed |= mean > allowed or half > allowed
            print(
                f"{label} steps: {bare:.0f} us bare, watching adds "
                f"{mean:.1f} us ({mean - half:.1f} to {mean + half:.1f}, {len(added)} pairs of "
                f"{size.blocks} blocks of {size.block} steps, "
                f"single pairs {min(added):.1f} to {max(added):.1f}); "
                f"allowed {allowed:.1f} us",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
