"""What the benchmarks measure programs with: from outside, on a clock of their own.

The programs print a line with a step now and then, flushed as it is printed; ``Job`` notes when
each line comes out of the pipe. ``timed`` lets several jobs take turns: one runs for some lines,
while the others are stopped by a signal, so that a drift of the machine's speed meets all alike.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TURN_SECONDS = 0.8
"""A turn of the fastest: in a shorter one its cold caches would count."""

_STEP_LINE = re.compile(rb"step (\d+) (?:loss|counts|nearest) (.*)")


class Results:
    """A file of finished measurements, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: list[dict[str, Any]] = []
        text = path.read_text("utf-8") if path.exists() else ""
        for line in text.splitlines():
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:  # of a run that was killed as it wrote
                print(f"{path}: left out: {line[:60]!r}", file=sys.stderr)
        self._is_torn = bool(text) and not text.endswith("\n")

    def add(self, program: str, kind: str, **measured: Any) -> dict[str, Any]:
        """Write a line, for good when this returns."""
        line = {"program": program, "kind": kind, **measured}
        with self._path.open("a", encoding="utf-8") as file:
            file.write("\n" * self._is_torn + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._is_torn = False
        self.lines.append(line)
        return line

    def of(self, program: str, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if (line["program"], line["kind"]) == (program, kind)]


class Job:
    """A command that is told to go on and to stand still.

    Args:
        command: the command.
        folder: in which it runs.
        variables: of its environment, beside those of this process.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # a process group, to be stopped as one
        )
        self.step = 0
        """The last one that was printed."""
        self.lines: list[tuple[int, str]] = []
        """Each step that was printed, and what was printed of it."""
        self.line_s = math.inf
        """What the last line and the one before were apart."""
        self.ran_s = 0.0
        """How long it has not stood still."""
        self.peak_bytes = 0
        """Of its largest process, once it has ended."""
        self._came_s = -math.inf
        self._running_since_s: float | None = time.monotonic()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()

    def go_on(self) -> None:
        """Let it run."""
        self._running_since_s = time.monotonic()
        os.killpg(self._process.pid, signal.SIGCONT)

    def stand_still(self) -> None:
        """Stop all its processes where they are."""
        os.killpg(self._process.pid, signal.SIGSTOP)
        self._note_that_it_ran()

    def next_line(self) -> bool:
        """Wait until it has printed one more line with a step; whether it did."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if (found := _STEP_LINE.match(line)) is not None:
                now_s = time.monotonic()
                self.line_s, self._came_s = now_s - self._came_s, now_s
                self.step = int(found[1])
                self.lines.append((self.step, found[2].decode()))
                return True
        return False

    def end(self) -> list[str]:
        """Wait for its end; what flatout said.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        while self.next_line():
            pass
        _, status, usage = os.wait4(self._process.pid, 0)
        self._note_that_it_ran()
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.peak_bytes = 1024 * usage.ru_maxrss
        self._errors.seek(0)
        said = self._errors.read().decode("utf-8", "replace")
        if self._process.returncode:
            raise subprocess.CalledProcessError(
                self._process.returncode, self._command, stderr=said
            )
        return [line for line in said.splitlines() if line.startswith("flatout: ")]

    @property
    def is_still(self) -> bool:
        return self._running_since_s is None

    def _note_that_it_ran(self) -> None:
        if self._running_since_s is not None:
            self.ran_s += time.monotonic() - self._running_since_s
        self._running_since_s = None


def timed(
    commands: Mapping[str, Sequence[str]],
    folder: Path,
    variables: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Run commands to their ends, in turns: all but one of them stand still.

    Each warms up first, until its second line; then a turn has as many lines as the fastest prints
    in ``TURN_SECONDS``. Counted are the rounds in which all had a turn.

    Args:
        commands: by name.
        folder: in which they run.
        variables: of the environment of those that need some, by name.

    Returns of each its mean step in seconds, the turns (steps, seconds), the seconds that all of it
    ran, its peak memory in bytes, the lines that it printed, and what flatout said.

    Raises:
        ValueError: one printed fewer than three lines.
        subprocess.CalledProcessError: one failed.
    """
    turns: dict[str, list[tuple[int, float]]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        jobs: dict[str, Job] = {}
        for name, command in commands.items():
            own = (variables or {}).get(name)
            jobs[name] = stack.enter_context(Job(command, folder, own))
            if not (jobs[name].next_line() and jobs[name].next_line()):
                jobs[name].end()
                raise ValueError(f"{name} printed too few lines with a step to time any")
            jobs[name].stand_still()
        fastest_s = min(job.line_s for job in jobs.values())
        lines = max(1, round(TURN_SECONDS / fastest_s))
        order = list(commands)
        while True:
            taken = {}
            for name in order:
                job, before = jobs[name], jobs[name].step
                began_s = time.monotonic()
                job.go_on()
                if not all(job.next_line() for _ in range(lines)):
                    break
                taken[name] = (job.step - before, time.monotonic() - began_s)
                job.stand_still()
            if len(taken) < len(order):
                break
            for name, turn in taken.items():
                turns[name].append(turn)
            order.reverse()
        said = {}
        for name, job in sorted(jobs.items(), key=lambda item: item[1].is_still):
            if job.is_still:
                job.go_on()
            said[name] = job.end()
    if not all(turns.values()):
        raise ValueError("too few lines with a step to time any")
    return {
        name: {
            "step_s": sum(s for _, s in turns[name]) / sum(steps for steps, _ in turns[name]),
            "turns": [(steps, round(seconds, 6)) for steps, seconds in turns[name]],
            "ran_s": round(job.ran_s, 6),
            "peak_bytes": job.peak_bytes,
            "lines": job.lines,
            "said": said[name],
        }
        for name, job in jobs.items()
    }
