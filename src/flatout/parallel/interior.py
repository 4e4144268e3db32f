"""What operators do differently inside a shard."""

from __future__ import annotations

import contextlib

from flatout.intercept.patch import Undo
from flatout.parallel import devices, draws, norms, shards, sums


def install() -> Undo:
    """Override the operators that must know of shards; returns the undo.

    Outside of ``shards.shard`` and ``shards.observing`` they do what they do without.
    """
    keys = devices.dispatch_keys()
    with contextlib.ExitStack() as undo:
        undo.callback(draws.install(keys))
        undo.callback(norms.install(keys))
        undo.callback(sums.install(keys))
        undo.callback(shards.install_checkpoint())
        return undo.pop_all().close
