"""What the guard of ``flatout run --plan`` costs a step of the language example.

    python benchmarks/guard.py [--batch-size 8] [--blocks 100]

The model trains in one process with ``precision=bf16`` and ``optimizer=onepass``. Of four steps two
are guarded, the outer or the inner ones by lot; their difference cancels drift, and the mean of the
middle half of all differences is the cost of a step, with its 95 % interval (bootstrap). A copy of
the weights, made every 30 s at most, is timed apart. Exits with 1 if a step costs more than is
allowed (2 % of it) beyond doubt. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "language"))

from data import VOCABULARY, get_batch, load_corpus
from model import GPT, Config

from flatout.agent import guard as guards
from flatout.agent.snapshot import Snapshot, size_bytes
from flatout.wire.request import GuardRequest, Request
from tests.hosts import host_in

ALLOWED_SHARE = 0.02
TRIMMED = 0.25
SETTINGS = {"precision": "bf16", "optimizer": "onepass"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=100, help="of four steps each")
    arguments = parser.parse_args()
    host = host_in(Path(tempfile.mkdtemp()), Request(settings=SETTINGS))
    host.hooks.install(live=False)
    for name, setting in SETTINGS.items():
        host.applied.apply(name, setting)
    guard = guards.Guard(host, GuardRequest())
    guard.install()

    def watch(on: bool) -> None:
        for callbacks, callback in (
            (host.before_optimizer_step, guard._before),
            (host.after_optimizer_step, guard._after),
            (host.backward_wrappers, guard._backward),
        ):
            if on != (callback in callbacks):
                (callbacks.append if on else callbacks.remove)(callback)

    torch.manual_seed(0)
    model = GPT(Config(VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text, _ = load_corpus()
    generator = torch.Generator().manual_seed(0)

    def step_ms() -> float:
        began = time.perf_counter()
        inputs, targets = get_batch(text, arguments.batch_size, model.config.context, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return (time.perf_counter() - began) * 1e3

    for _ in range(10):
        step_ms()
    lot = random.Random(0)
    bare_ms, added_ms = [], []
    for _ in range(arguments.blocks):
        taken = [0.0, 0.0]
        for on in lot.choice([(True, False, False, True), (False, True, True, False)]):
            watch(on)
            taken[on] += step_ms()
        bare_ms.append(taken[0] / 2)
        added_ms.append((taken[1] - taken[0]) / 2)
    watch(True)
    median_ms = statistics.median(bare_ms)
    cost_ms = float(stats.trim_mean(added_ms, TRIMMED))
    interval = stats.bootstrap(
        (np.array(added_ms),), lambda x, axis: stats.trim_mean(x, TRIMMED, axis), random_state=0
    ).confidence_interval
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, batches of {arguments.batch_size}, step {median_ms:.4g} ms bare")
    print(
        f"guard: {cost_ms * 1e3:.0f} us a step ({interval.low * 1e3:.0f} to "
        f"{interval.high * 1e3:.0f}), {cost_ms / median_ms:.2%}"
    )
    copies = Snapshot()
    for number in range(3):
        began = time.perf_counter()
        why = copies.take([model], [optimizer])
        taken_ms = (time.perf_counter() - began) * 1e3
        bytes_copied = size_bytes([model], [optimizer])
        print(f"copy {number + 1}: {why or f'{bytes_copied / 2**20:.0f} MiB in {taken_ms:.1f} ms'}")
    guard.remove()
    return int(interval.low > ALLOWED_SHARE * median_ms)


if __name__ == "__main__":
    sys.exit(main())
