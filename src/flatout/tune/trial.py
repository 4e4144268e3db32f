"""One trial: one run of the job that is asked to stop after some steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatout import launch
from flatout.record import ProcessRecord
from flatout.request import Request

_TAIL_LINES = 12


class TrialFailedError(Exception):
    """A trial that gave no usable record: why, and the program's last lines.

    Attributes:
        process: what was recorded all the same, ``None`` when nothing was.
        tail: the end of the program's output.
    """

    def __init__(self, why: str, process: ProcessRecord | None, tail: str) -> None:
        super().__init__(why)
        self.process = process
        self.tail = tail


@dataclass(frozen=True)
class Trial:
    """What a trial left behind.

    Attributes:
        process: the record of the process that trained.
        seconds: wall time of the whole command.
        ended: whether the program came to its end by itself.
    """

    process: ProcessRecord
    seconds: float
    ended: bool


def run(
    command: Sequence[str], request: Request, *, isolate: bool, timeout_seconds: float
) -> Trial:
    """Run the job once.

    Args:
        command: the job.
        request: what the agent shall do; it should stop the program.
        isolate: run it in a copy-on-write view of the file system.
        timeout_seconds: limit for the whole command.

    Raises:
        TrialFailedError: it failed, hung, or recorded nothing.
        UserError: it could not be started, or its record was lost.
    """
    finished = launch.start(
        command, request, isolate=isolate, output="capture", timeout_seconds=timeout_seconds
    )
    tail = "\n".join((finished.output or "").splitlines()[-_TAIL_LINES:])
    process = finished.read_record().main
    if finished.timed_out:
        why = f"it was stopped after {timeout_seconds:.0f} s, far longer than expected"
    elif finished.returncode < 0:
        why = f"it was killed by signal {-finished.returncode}"
    elif finished.returncode > 0:
        why = f"it failed with exit code {finished.returncode}"
    elif process is None:
        why = "no Python process of it imported torch with flatout's agent"
    else:
        ended = process.end is None or process.end.get("reason") != "stopped"
        return Trial(process, finished.seconds, ended)
    raise TrialFailedError(why, process, tail)


def reasons(process: ProcessRecord, what: str) -> dict[str, str]:
    """The reason of the last event of a kind, for each subject (a knob, or ``arm N``)."""
    return {event.subject: event.why for event in process.events if event.what == what}
