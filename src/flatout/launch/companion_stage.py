"""Starts the ranks 1, 2, ... of a run beside rank 0, and leaves nothing of them behind.

``command`` returns the command line of a *stage*: this file, run as a script. The stage starts each
companion in a session of its own, so that no terminal's signals reach it, and notes how it ended.
It ends when all companions have ended, or at SIGTERM, which it also gets when flatout dies. It then
kills all processes that the companions have started: as their subreaper it is their parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STATUS_PREFIX = "died-"
"""A file ``died-RANK`` in the run directory tells of a companion that did not end with 0: how, in
words, on the first line, and on the second its exit status; if negative, the signal that killed
it."""

GONE_PREFIX = "gone-"
"""A file ``gone-RANK`` in the run directory tells of a companion that has ended with 0."""

_TAIL_BYTES = 4096
_SHOWN_CHARACTERS = 200
"""How much of the output of a companion that failed is read, and shown of its last line."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
"""From linux/prctl.h."""

_AWAITED = {signal.SIGCHLD, signal.SIGTERM}


def command(
    job: Sequence[str], companions: list[dict[str, Any]], run_directory: Path, started_by: int
) -> list[str]:
    """The command line that runs the companions, in the environment that they have in common.

    Args:
        job: program and arguments, those of each companion.
        companions: ``rank``, ``variables`` (added to the environment), ``output`` (the file for
            standard output and error) and ``processors`` (the numbers of those that it may run on)
            of each.
        run_directory: where the files ``died-RANK`` and ``gone-RANK`` are written.
        started_by: id of flatout's process.
    """
    options = {
        "companions": companions,
        "run_directory": str(run_directory),
        "started_by": started_by,
    }
    return [sys.executable, "-I", "-S", __file__, json.dumps(options), "--", *job]


def _main() -> None:
    options = json.loads(sys.argv[1])
    job = sys.argv[3:]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != options["started_by"]:
        return
    companions = options["companions"]
    started = [_start(job, companion, mask) for companion in companions]
    running = {process.pid: of for process, of in zip(started, companions, strict=True)}
    while running and signal.sigwait(_AWAITED) == signal.SIGCHLD:
        _note_ended(running, Path(options["run_directory"]))
    _end_all()


def _start(job: list[str], companion: dict[str, Any], mask: set[int]) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.sched_setaffinity(0, companion["processors"])
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    with open(companion["output"], "ab") as output, _standard_input() as standard_input:
        return subprocess.Popen(
            job,
            env={**os.environ, **companion["variables"]},
            stdin=standard_input,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=prepare,
        )


def _standard_input() -> Any:
    """Open a regular file again, as each rank reads all of it; only rank 0 reads anything else."""
    path, position = os.devnull, 0
    try:
        if stat.S_ISREG(os.fstat(0).st_mode):
            path, position = "/proc/self/fd/0", os.lseek(0, 0, os.SEEK_CUR)
        opened = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by the caller
    except OSError:  # it is closed, or may not be opened again
        return open(os.devnull, "rb", buffering=0)
    opened.seek(position)
    return opened


def _note_ended(running: dict[int, dict[str, Any]], run_directory: Path) -> None:
    """Reap what has ended, and write down how each companion has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        companion = running.pop(pid, None)
        returncode = os.waitstatus_to_exitcode(status)
        if companion is not None and not returncode:
            (run_directory / f"{GONE_PREFIX}{companion['rank']}").touch()
        elif companion is not None:
            how = ending(returncode)
            if returncode > 0:
                how += _last_words(Path(companion["output"]))
            note = run_directory / f"{STATUS_PREFIX}{companion['rank']}"
            partial = note.with_name(f"{note.name}.partial")
            partial.write_text(f"{how}\n{returncode}\n", "utf-8", "replace")
            partial.replace(note)


def ending(returncode: int) -> str:
    """How a process has ended, in words, from its exit status or negative signal."""
    if returncode < 0:
        number = -returncode
        is_named = number in set(signal.Signals)  # real-time signals have no names
        return f"killed by {signal.Signals(number).name if is_named else f'signal {number}'}"
    return f"exit status {returncode}"


def _last_words(output: Path) -> str:
    """The last line of an output, which for Python is the exception."""
    with open(output, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = file.read().decode("utf-8", "replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    shown = "".join(c if c.isprintable() else "?" for c in last[:_SHOWN_CHARACTERS])
    return f", its last line is {shown!r}" if shown else ""


def _end_all() -> None:
    """Kill all processes that have this one as an ancestor. Orphans become its children."""
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _children() -> list[int]:
    """The children of this process that have not been waited for (proc(5))."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_bytes().rpartition(b")")[2].split()
            except OSError:
                continue  # it has ended meanwhile
            if int(fields[1]) == os.getpid():
                found.append(int(name))
    return found


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    _main()
