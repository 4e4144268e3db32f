"""Alternating two runs in blocks of steps: while one run makes its steps, the other run waits.

Each run is a process of its own, with its own allocator and caches; nevertheless a drift of the
machine's speed affects both alike. At the end of a block, a process creates a file in a common
folder, and the other process waits for this file. ``launch/relay.py`` starts the two processes, and
creates a file when one of them has ended. The time of a wait belongs to no step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from flatout.wire.request import Relay
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.usage import UsageLog
    from flatout.intercept.host import Host

_SHORTEST_POLL_S, _LONGEST_POLL_S = 0.0005, 0.01
"""The bounds of the time between two checks for a file. The waiting process must not take time from
the other process, so it checks about once per step."""


def wait_to_begin(relay: Relay) -> None:
    """Wait until the first process has warmed up, if this is the second process.

    This is called after ``import torch``. Two processes that warm up at the same time take ten
    times as long, because each uses all cores.
    """
    if relay.place == 1:
        _wait_for(relay, f"ready-{1 - relay.place}", _LONGEST_POLL_S)


def _wait_for(relay: Relay, name: str, poll_s: float) -> None:
    """Wait until the other process has created a file or has ended."""
    folder = Path(relay.folder)
    file, ended = folder / name, folder / f"ended-{1 - relay.place}"
    while not file.exists() and not ended.exists():
        time.sleep(poll_s)


class Runner:
    """The stage of a process that alternates with another process.

    Steps before the first block are marked ``first``, and steps that are discarded after a wait
    ``switched``. If
    another process of the same job takes part already, this process makes its steps without
    waiting.

    Args:
        host: the host of this process.
        relay: the part of this process in the relay, and the lengths of the blocks.
        usage: takes a reading of CPU time at the beginning and at the end of each block.
    """

    def __init__(self, host: Host, relay: Relay, usage: UsageLog) -> None:
        self._host = host
        self._relay = relay
        self._usage = usage
        self._folder = Path(relay.folder)
        self._steps = 0
        self._takes_part = True
        self._poll_s = _SHORTEST_POLL_S
        host.arm = relay.place
        host.mark = "first"

    def at_boundary(self, turn: Turn) -> bool:
        """Count a step that has ended, and wait if its block is over.

        Returns:
            Whether all blocks are over.
        """
        if not self._host.counts_as_step(turn):
            return False
        relay = self._relay
        self._steps += 1
        if self._host.mark is None:
            step_s = (turn.end_ns - turn.start_ns) / 1e9
            self._poll_s = min(max(step_s, _SHORTEST_POLL_S), _LONGEST_POLL_S)
        if self._steps < relay.warmup_steps:
            return False
        blocks_done, step = divmod(self._steps - relay.warmup_steps, relay.block_steps)
        if step == 0:
            begin_ns = time.perf_counter_ns()
            is_over = self._end_block(blocks_done)
            self._host.add_pause(begin_ns)
            return is_over
        if step == relay.discard_steps:
            self._host.mark = None
        return False

    def _end_block(self, blocks_done: int) -> bool:
        """Let the other process run, and wait for the next block of this process.

        Returns:
            Whether there is no next block.
        """
        relay = self._relay
        self._usage.note()
        if blocks_done == 0:
            self._takes_part = self._create(f"ready-{relay.place}")
            self._wait(f"ready-{1 - relay.place}")
        else:
            self._create(f"done-{relay.place}-{blocks_done}")
        if blocks_done == relay.blocks:
            if relay.place == 0:  # the rest of this program would slow down the other process
                self._wait(f"done-1-{blocks_done}")
            self._host.arm = self._host.mark = None
            return True
        blocks_of_other = blocks_done + relay.place
        if blocks_of_other:
            self._wait(f"done-{1 - relay.place}-{blocks_of_other}")
        self._usage.note(with_work=True)
        self._host.arm = relay.place  # a new block begins
        self._host.mark = "switched" if relay.discard_steps else None
        return False

    def _create(self, name: str) -> bool:
        """Create a file; return whether the file is new."""
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
