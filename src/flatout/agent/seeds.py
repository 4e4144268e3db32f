"""Seeding the random number generators, and shifting the seeds that the program sets itself.

A program that sets its own seed would give the same losses in every run, and the seed-to-seed
standard deviation, which a proof needs, could not be measured. So a multiple of the run's seed is
added to every seed that the program sets: the same amount in all processes, and 0 for seed 0.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import multiprocessing
import random
import sys
from typing import Any

import torch

if "numpy" in sys.modules:
    # NumPy imports this at its first use, which would be in ``set_seeds``, on the program's heap.
    importlib.import_module("numpy.random")

STRIDE = 1_000_003
"""The difference between the seeds of the program in two runs with consecutive seeds. It is a
prime, far larger than the ranks and epochs that programs add to their seeds."""

_PARAMETERS = ("seed", "a")
"""The names of the seed parameter: ``seed`` in torch and NumPy, ``a`` in ``random``."""


def set_seeds(seed: int) -> None:
    """Seed the generators of ``random``, torch and NumPy (if it is imported), and shift the seeds
    that the program sets later.

    Args:
        seed: the seed of the request; ``seed * STRIDE`` is added to each seed of the program.
    """
    numpy = sys.modules.get("numpy")
    random.seed(seed)
    torch.manual_seed(seed)
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    if seed == 0:
        return
    shift = seed * STRIDE
    _shift_seeds(torch, "manual_seed", shift)
    _shift_seeds(torch.random, "manual_seed", shift)
    _shift_seeds(torch.cuda, "manual_seed", shift)
    _shift_seeds(torch.cuda, "manual_seed_all", shift)
    _shift_seeds(random, "seed", shift)
    if numpy is not None:
        _shift_seeds(numpy.random, "seed", shift)


def seed_alike(seed: int) -> None:
    """Seed torch's generator for the CPU and NumPy's global one as on the other ranks.

    Both start from numbers of the operating system otherwise. The hook (``launch/hook``) seeds
    ``random``. What the program has seeded itself stays; torch has just been imported, and NumPy
    forgets its first seed where the program gives another. Different processes of one rank get
    different seeds.

    Args:
        seed: of the run.
    """
    process = multiprocessing.current_process().name
    digest = hashlib.sha256(repr((seed, sys.argv, process)).encode("utf-8", "replace")).digest()
    torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    numpy = sys.modules.get("numpy")
    if numpy is not None and numpy.random.get_bit_generator().seed_seq is not None:
        numpy.random.seed(int.from_bytes(digest[8:12], "little"))


def _shift_seeds(module: Any, name: str, shift: int) -> None:
    """Wrap a seeding function of a module, so that ``shift`` is added to the seed."""
    original = getattr(module, name)

    @functools.wraps(original)
    def set_shifted_seed(*args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], int):
            args = ((args[0] + shift) % 2**32, *args[1:])
        kwargs = {
            key: (value + shift) % 2**32 if key in _PARAMETERS and isinstance(value, int) else value
            for key, value in kwargs.items()
        }
        return original(*args, **kwargs)

    setattr(module, name, set_shifted_seed)
