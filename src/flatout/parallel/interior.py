"""What operators do differently inside a shard."""

from __future__ import annotations

import contextlib

from flatout.intercept.patch import Undo
from flatout.parallel import draws, norms, shards, sums


def install() -> Undo:
    """Override the operators that must know of shards; returns the undo.

    Outside of ``shards.shard`` and ``shards.observing`` they do what they do without.
    """
    with contextlib.ExitStack() as undo:
        for part in (draws.install, norms.install, sums.install, shards.install_checkpoint):
            undo.callback(part())
        return undo.pop_all().close
