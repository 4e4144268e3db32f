"""A program whose ranks exchange tensors of known sizes: ``here.py`` runs it with ``--ranks``.

With the first argument ``gloo``, they exchange as ranks of several hosts do. The last line of its
output is the time to read the header of one rank, in seconds.
"""

from __future__ import annotations

import os
import sys
import time

from flatout.wire.request import ADDRESS_VARIABLE

if sys.argv[1:2] == ["gloo"]:  # before the agent starts, when torch is imported
    os.environ[ADDRESS_VARIABLE] = "127.0.0.1"
    del sys.argv[1]

import torch

from flatout.parallel.header import Header, Meeting, attached_bytes

STEPS = 40
"""Of each kind, some of which warm up."""

HEADERS = 256


class Exchanging(torch.nn.Module):
    """A module whose outputs and gradients have any size, and which computes next to nothing.

    Args:
        columns: elements of each row of its output.
        parameters: elements of its parameter.
    """

    def __init__(self, columns: int, parameters: int) -> None:
        super().__init__()
        self.columns = columns
        self.weight = torch.nn.Parameter(torch.zeros(parameters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return rows of the given length."""
        return (x * self.weight[0]).expand(-1, self.columns)


def exchange(columns: int, parameters: int) -> None:
    """Train for some steps, then make some calls without gradients, which add nothing up."""
    model = Exchanging(columns, parameters)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(2, 1)
    for _ in range(STEPS):
        loss = model(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for _ in range(STEPS):
            model(x)


def time_header() -> float:
    """Return how long it takes to read the header of a rank, in seconds: as a channel and a team
    do, in a meeting of many ranks."""
    packed = Header(0, Meeting.CALL).pack(0)
    length = len(packed) + attached_bytes(2, is_fast=False)
    view = memoryview(bytearray(packed.ljust(length, b"\0") * HEADERS))
    times_s = []
    for _ in range(5):
        began_s = time.perf_counter()
        rows = [view[rank * length : (rank + 1) * length] for rank in range(HEADERS)]
        if any(bytes(row[: len(packed)]) != packed for row in rows):
            raise AssertionError
        times_s.append((time.perf_counter() - began_s) / HEADERS)
    return min(times_s)


if __name__ == "__main__":
    torch.manual_seed(0)
    for words in sys.argv[1:]:
        exchange(*map(int, words.split("x")))
    print(time_header())
