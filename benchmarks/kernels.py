"""Flatout's kernels against torch's own operators, interleaved.

    python benchmarks/kernels.py [--pairs 20]

Both take turns in blocks of calls, each block after two calls that are not timed; a ratio is the
geometric mean over pairs of blocks, with its 95 % interval (t, over the logarithms). Exits with 1
when a ratio lies below what is asked of it. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

from flatout import kernels
from flatout.knobs import random

BLOCK_S = 0.05
"""Length of a block of torch's calls, about."""


class Ratio(NamedTuple):
    """How many times faster, with its 95 % interval over pairs of blocks."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.1f}x ({self.low:.1f} to {self.high:.1f}, {self.pairs} pairs)"


def interleaved(
    call: Callable[[], object], switched: Callable[[], AbstractContextManager[None]], pairs: int
) -> tuple[float, float, Ratio]:
    """Microseconds of a call bare and switched (medians), and their ratio."""

    def block_us(count: int) -> float:
        call(), call()
        start = time.perf_counter_ns()
        for _ in range(count):
            call()
        return (time.perf_counter_ns() - start) / count / 1e3

    count = max(1, math.ceil(BLOCK_S * 1e6 / block_us(3)))
    bare, fast = [], []
    for pair in range(pairs):
        for on in (False, True) if pair % 2 else (True, False):
            if on:
                with switched():
                    fast.append(block_us(count))
            else:
                bare.append(block_us(count))
    logs = np.log(np.array(bare) / np.array(fast))
    half = stats.t.ppf(0.975, pairs - 1) * stats.sem(logs)
    value, low, high = np.exp([logs.mean(), logs.mean() - half, logs.mean() + half])
    return float(np.median(bare)), float(np.median(fast)), Ratio(value, low, high, pairs)


@contextmanager
def fast_random():  # type: ignore[no-untyped-def]
    undo = random.install(kernels.load("bernoulli"), paired=False)
    yield
    undo()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    pairs = parser.parse_args().pairs
    failed = False
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for dtype in (torch.float32, torch.bfloat16):
        for power in (4, 5, 6, 7):
            tensor = torch.empty(10**power, dtype=dtype)
            bare_us, fast_us, ratio = interleaved(
                lambda tensor=tensor: tensor.bernoulli_(0.8), fast_random, pairs
            )
            asked = 15 if power >= 6 else 1
            failed |= ratio.low < asked
            print(
                f"bernoulli_ of 1e{power} {str(dtype)[6:]}: {bare_us:.4g} us, "
                f"{fast_us:.4g} us, {ratio}; asked: {asked}x",
                flush=True,
            )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
