"""What a run directory tells of ranks that have died, and what follows from it for rank 0."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flatout import paths
from flatout.launch import companion_stage

OWN_END_S = 7.0
"""Time that rank 0 gets to end by itself once another rank was killed. Together with the time
between SIGTERM and SIGKILL (``process``) it is less than ten seconds."""

_NOT_SENT_BY_USERS = {
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
}
"""Signals that tell of a failure, or of a kernel that was out of memory."""


def output_file(run_directory: Path, rank: int) -> Path:
    """The file that holds the output of a companion."""
    return run_directory / f"rank-{rank}.txt"


@dataclass(frozen=True)
class Failure:
    """How a rank has failed, in words, and its exit status or negative signal."""

    rank: int
    how: str
    returncode: int


class Deaths:
    """The deaths of other ranks, as rank 0 learns of them.

    Args:
        run_directory: of rank 0.
        stage_status: returns how the process that runs other ranks on this host has ended; ``None``
            while it runs.

    Attributes:
        ended_rank_0: whether rank 0 was ended because another rank was killed.
    """

    def __init__(
        self, run_directory: Path, stage_status: Callable[[], int | None] = lambda: None
    ) -> None:
        self.ended_rank_0 = False
        self._run_directory = run_directory
        self._stage_status = stage_status
        self._killed_s: float | None = None

    def must_rank_0_end(self) -> bool:
        """Whether another rank was killed and rank 0, which needs it, has not ended in time."""
        if self._is_rank_0_alone():
            return False
        if self._killed_s is None:
            if self._stage_status() or any(one.returncode < 0 for one in self._failed()):
                self._killed_s = time.monotonic()
        elif time.monotonic() - self._killed_s >= OWN_END_S:
            self.ended_rank_0 = True
        return self.ended_rank_0

    def first(self) -> Failure | None:
        """The rank that has failed first; ``None``: none has."""
        return next(iter(self._failed()), None)

    def explain(self, returncode: int) -> str | None:
        """A sentence about the rank that failed first; ``None``: none did, or all alike.

        Args:
            returncode: how rank 0 ended.
        """
        if -returncode in _NOT_SENT_BY_USERS and not self.ended_rank_0:
            how = companion_stage.ending(returncode)
            return f"rank 0 has died: {how}, so the other ranks were ended"
        if self._is_rank_0_alone():
            return None
        first = self.first()
        stage_status = self._stage_status()
        if first is not None:
            output = output_file(self._run_directory, first.rank)
            where = f" (output: {paths.shown(output)})" * output.exists()
            what = f"rank {first.rank} has died: {first.how}{where}"
        elif stage_status:
            how = companion_stage.ending(stage_status)
            what = f"the process that runs the other ranks has died: {how}"
        else:
            return None
        if self.ended_rank_0:
            return f"{what}, so rank 0 was ended"
        is_own_failure = returncode >= 0 and (first is None or first.returncode != returncode)
        return what if is_own_failure else None

    def _is_rank_0_alone(self) -> bool:
        """Whether rank 0 has gone on alone (``parallel.ending``), so that no other can stop it."""
        return any(self._run_directory.glob("alone-*"))

    def _failed(self) -> list[Failure]:
        """The ranks that have failed, the first one first."""
        prefix = companion_stage.STATUS_PREFIX
        notes = [
            path
            for path in self._run_directory.glob(f"{prefix}*")
            if path.name.removeprefix(prefix).isdecimal()
        ]
        found = []
        for note in sorted(notes, key=lambda path: path.stat().st_mtime_ns):
            how, returncode = note.read_text("utf-8").splitlines()
            found.append(Failure(int(note.name.removeprefix(prefix)), how, int(returncode)))
        return found
