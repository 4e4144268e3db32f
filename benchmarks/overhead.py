"""What watching costs: the same program bare and under ``flatout run``, in alternation.

    python benchmarks/overhead.py [--pairs 6]

For steps of about 1, 10 and 100 ms: the difference of the mean step (measured by the program's own
clock), its 95 % confidence interval over the pairs, and what is allowed: 20 microseconds and 0.5 %.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ALLOWED_US = 20.0
ALLOWED_SHARE = 0.005

PROGRAM = """
import sys, time
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
width, steps, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
                    nn.Linear(width, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
data = TensorDataset(torch.randn(256, width), torch.randint(0, 10, (256,)))
loss_function = nn.CrossEntropyLoss()
warmup = steps // 5
times, left = [], steps + warmup
while left:
    for x, y in DataLoader(data, batch_size=16):
        loss = loss_function(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left -= 1
        times.append(time.perf_counter())
        if not left:
            break
kept = times[warmup:]
open(file, "w").write(repr((kept[-1] - kept[0]) / (len(kept) - 1) * 1e6))
"""

SIZES = {"1 ms": (64, 8000), "10 ms": (768, 800), "100 ms": (2560, 80)}
"""Width of the network and number of steps."""


def step_us(folder: Path, width: int, steps: int, watched: bool) -> float:
    """Mean step in microseconds of one run."""
    file = folder / "step_us"
    command = [sys.executable, str(folder / "program.py"), str(width), str(steps), str(file)]
    if watched:
        command = [sys.executable, "-m", "flatout", "run", "--", *command]
    environment = {**os.environ, "FLATOUT_HOME": str(folder / "home")}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    return float(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    arguments = parser.parse_args()
    from scipy import stats

    failed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "program.py").write_text(PROGRAM)
        for label, (width, steps) in SIZES.items():
            bare, added = [], []
            for pair in range(arguments.pairs):
                order = (False, True) if pair % 2 == 0 else (True, False)
                times = {watched: step_us(folder, width, steps, watched) for watched in order}
                bare.append(times[False])
                added.append(times[True] - times[False])
            mean = statistics.fmean(added)
            half = stats.t.ppf(0.975, len(added) - 1) * stats.sem(added)
            allowed = ALLOWED_US + ALLOWED_SHARE * statistics.fmean(bare)
            failed |= mean - half > allowed
            print(
                f"{label} steps: {statistics.median(bare):.0f} us bare, watching adds "
                f"{mean:.1f} us ({mean - half:.1f} to {mean + half:.1f}, {len(added)} pairs, "
                f"single differences {min(added):.1f} to {max(added):.1f}); "
                f"allowed {allowed:.1f} us",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
