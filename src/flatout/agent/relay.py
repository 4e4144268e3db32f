"""Two runs take turns in blocks of steps: while one makes its steps, the other waits.

They are processes of their own, with their own allocators and caches, and yet a drift of the
machine's speed meets both alike. The baton is handed on by files in a folder that both know;
``launch/relay.py`` starts the two and tells the one that waits when the other has ended.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from flatout.wire.request import Relay
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.intercept.host import Host

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.0005, 0.01
"""Between two looks for the baton. The one that waits must not take time from the one that runs, so
it looks about once a step; the step that follows a wait is left out in any case."""


def wait_to_begin(relay: Relay) -> None:
    """Called as torch has been imported: the second waits until the first has warmed up.

    Two that warm up at the same time would take ten times as long, as each asks for all the cores.
    """
    if relay.place == 1:
        _wait_for(relay, f"ready-{1 - relay.place}", _LONGEST_POLL_S)


def _wait_for(relay: Relay, name: str, poll_s: float) -> None:
    """Wait until the other has made a file, or has ended."""
    folder = Path(relay.folder)
    file, ended = folder / name, folder / f"ended-{1 - relay.place}"
    while not file.exists() and not ended.exists():
        time.sleep(poll_s)


class Runner:
    """The stage of a host that runs in a relay.

    Steps are marked ``first`` before the first block, and ``switched`` where they follow a wait.
    If another process of the same job runs already, this one makes its steps without waiting.

    Args:
        host: of this process.
        relay: which of the two it is, and how long the blocks are.
    """

    def __init__(self, host: Host, relay: Relay) -> None:
        self._host = host
        self._relay = relay
        self._folder = Path(relay.folder)
        self._steps = 0
        self._takes_part = True
        self._poll_s = _SHORTEST_POLL_S
        host.arm = relay.place
        host.mark = "first"

    def at_boundary(self, turn: Turn) -> bool:
        """A turn has closed; returns whether all blocks are over."""
        if not self._host.counts_as_step(turn):
            return False
        relay = self._relay
        self._steps += 1
        if self._host.mark is None:
            step_s = (turn.end_ns - turn.start_ns) / 1e9
            self._poll_s = min(max(step_s, _SHORTEST_POLL_S), _LONGEST_POLL_S)
        if self._steps < relay.warmup_steps:
            return False
        finished, step = divmod(self._steps - relay.warmup_steps, relay.block_steps)
        if step == relay.discard_steps:
            self._host.mark = None
        elif step == 0:
            if finished == 0:
                self._takes_part = self._make(f"ready-{relay.place}")
                self._wait(f"ready-{1 - relay.place}")
            else:
                self._make(f"done-{relay.place}-{finished}")
            if finished == relay.blocks:
                if relay.place == 0:  # what it does at its end would slow the other's last block
                    self._wait(f"done-1-{finished}")
                self._host.arm = self._host.mark = None
                return True
            others_finished = finished + relay.place
            if others_finished:
                self._wait(f"done-{1 - relay.place}-{others_finished}")
            self._host.mark = "switched"
        return False

    def _make(self, name: str) -> bool:
        """Make a file; whether it was not there."""
        if not self._takes_part:
            return False
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _wait(self, name: str) -> None:
        if self._takes_part:
            _wait_for(self._relay, name, self._poll_s)
