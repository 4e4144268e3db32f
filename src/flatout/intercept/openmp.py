"""The threads of OpenMP, which torch computes with.

After its part of a computation a thread waits for the next one in a loop, for milliseconds, and has
its core all to itself. What else is to run there meanwhile runs at half the speed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

_SOFT = 1
"""``omp_pause_soft`` (OpenMP 5.0, section 3.2.44), which keeps what a program has set:
https://gcc.gnu.org/onlinedocs/libgomp/omp_005fpause_005fresource_005fall.html"""


def release_threads() -> None:
    """Let the threads end that wait for the calling one; it gets others when it computes again.

    Nothing happens where there are none, or where the runtime of OpenMP does not know of it.
    """
    _pause()(_SOFT)


@functools.cache
def _pause() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).omp_pause_resource_all
    except (OSError, AttributeError, TypeError):
        return lambda _: -1
