"""What a program with a planted bottleneck knows of itself: how long the planted part takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Truth:
    """Times the planted part; prints ``planted PART_S STEP_S`` at the end of every step."""

    def __init__(self) -> None:
        self._part_s = 0.0
        self._step_began_s = time.perf_counter()

    @contextmanager
    def part(self) -> Iterator[None]:
        """The planted part."""
        began_s = time.perf_counter()
        yield
        self._part_s += time.perf_counter() - began_s

    def add(self, seconds: float) -> None:
        """Add to the planted part what was timed otherwise."""
        self._part_s += seconds

    def step(self) -> None:
        """A training step is over."""
        now_s = time.perf_counter()
        print(f"planted {self._part_s:.9f} {now_s - self._step_began_s:.9f}")
        self._part_s = 0.0
        self._step_began_s = now_s
