"""Skipping the random numbers that are drawn for the samples of other ranks.

The generators of torch (on the CPU), of ``random`` and of NumPy are Mersenne Twisters (Matsumoto
and Nishimura 1998), which give a sequence of words of 32 bits. If every sample takes as many words,
the states of the generators at any sample follow from those at the first.
"""

from __future__ import annotations

import random
import struct
import sys
from typing import Any, NamedTuple

import torch

_WORDS = 624
"""Words in the state of a Mersenne Twister, which it makes anew once all of them are drawn."""

_LEFT = struct.Struct("<Qi")
"""Seed and number of words left, at the begin of a state of torch's (CPUGeneratorImpl.cpp)."""


class Positions(NamedTuple):
    """How many words have been drawn from each generator, up to a multiple of ``_WORDS``.

    Attributes:
        of_torch, of_python, of_numpy: from the global generators.
    """

    of_torch: int
    of_python: int
    of_numpy: int

    @classmethod
    def now(cls) -> Positions:
        """Return the present positions; those of generators of another kind are 0."""
        _, left = _LEFT.unpack(bytes(torch.get_rng_state()[: _LEFT.size].tolist()))
        _, words, _ = random.getstate()
        return cls(-left % _WORDS, words[-1] % _WORDS, _numpy_position())

    def since(self, earlier: Positions) -> Positions:
        """Return how many words were drawn between two positions, if they were not too many."""
        return Positions(*((a - b) % _WORDS for a, b in zip(self, earlier, strict=True)))

    def skip(self, times: int) -> None:
        """Draw as many words as these, so many times."""
        if self.of_torch:
            torch.empty(times * self.of_torch, dtype=torch.int32, device="cpu").random_()
        if self.of_python and times:
            random.getrandbits(32 * times * self.of_python)
        if self.of_numpy:
            sys.modules["numpy.random"].bytes(4 * times * self.of_numpy)


def _numpy_position() -> int:
    numpy: Any = sys.modules.get("numpy.random")
    state = {} if numpy is None else numpy.get_state(legacy=False)
    return int(state.get("state", {}).get("pos", 0)) % _WORDS


NONE = Positions(0, 0, 0)
"""No random numbers."""
