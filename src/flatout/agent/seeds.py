"""Seeds: what the request sets, and what the program sets itself, moved by it.

A program that seeds itself would give the same losses from every seed, and its seed-to-seed spread,
which is the yardstick of a proof, could not be measured. So its own seeds are moved by the
request's: all of them alike, in all processes, and not at all by seed 0.
"""

from __future__ import annotations

import functools
import random
import sys
from typing import Any

import torch

STRIDE = 1_000_003
"""Between the seeds of two runs: a prime, far from the ranks and epochs that programs add."""


def sow(seed: int) -> None:
    """Seed every generator that a program is likely to draw from, and move its own seeds.

    Args:
        seed: the request's; the program's own become ``own + seed * STRIDE``.
    """
    numpy = sys.modules.get("numpy")
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    if seed == 0:
        return
    moved = seed * STRIDE
    _move(torch, "manual_seed", moved)
    _move(torch.random, "manual_seed", moved)
    _move(torch.cuda, "manual_seed", moved)
    _move(torch.cuda, "manual_seed_all", moved)
    _move(random, "seed", moved)
    if numpy is not None:
        _move(numpy.random, "seed", moved)


def _move(namespace: Any, name: str, moved: int) -> None:
    """Have a function add ``moved`` to the seed that it is called with."""
    own = getattr(namespace, name)

    @functools.wraps(own)
    def seeded(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], int):
            args = ((args[0] + moved) % 2**32, *args[1:])
        kwargs = {
            key: (value + moved) % 2**32 if key in _KEYWORDS and isinstance(value, int) else value
            for key, value in kwargs.items()
        }
        return own(*args, **kwargs)

    setattr(namespace, name, seeded)


_KEYWORDS = ("seed", "a")
"""Names of the parameter, in torch and NumPy, and in ``random``."""
