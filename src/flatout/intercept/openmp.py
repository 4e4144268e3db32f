"""Releasing the OpenMP threads that torch computes with.

After its part of a computation, an OpenMP thread spins for milliseconds and waits for the next
computation. Meanwhile, a thread of another pool gets only half of the same core.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_SOFT = 1
"""``omp_pause_soft`` (OpenMP 5.0, section 3.2.44), which preserves the settings of the program:
https://gcc.gnu.org/onlinedocs/libgomp/omp_005fpause_005fresource_005fall.html"""


def release_threads() -> None:
    """End the waiting OpenMP threads of the calling thread. It starts new ones when it computes.

    Nothing happens if there are no such threads, or if the OpenMP runtime has no
    ``omp_pause_resource_all``.
    """
    _pause()(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).omp_pause_resource_all
    except (OSError, AttributeError, TypeError):
        return lambda _: -1
