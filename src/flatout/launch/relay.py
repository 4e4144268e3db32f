"""Runs one job twice at the same time; the two alternate in blocks of steps (``agent/relay.py``).

``command`` returns the command line of a *stage*: this file, run as a script, which starts both and
waits for them. When one ends, the stage tells the other; when one fails, it kills the other.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUSES_FILE = "statuses.json"
"""The file in the relay's folder that has both exit statuses when both have ended. A negative
status is the signal that killed it."""


def command(jobs: list[dict[str, Any]], folder: Path) -> list[str]:
    """The command line that runs both.

    Args:
        jobs: ``command``, ``variables`` (added to the environment) and ``output`` (the file for
            standard output and error) of each.
        folder: the relay's folder.
    """
    options = json.dumps({"jobs": jobs, "folder": str(folder)})
    return [sys.executable, "-I", "-S", __file__, options]


def _main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler prints a traceback
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    running: dict[int, int] = {}
    statuses = [0, 0]
    for place, job in enumerate(options["jobs"]):
        with open(job["output"], "ab") as output:
            started = subprocess.Popen(
                job["command"],
                env={**os.environ, **job["variables"]},
                stdout=output,
                stderr=output,
                preexec_fn=_die_with_parent,
            )
        running[started.pid] = place
    while running:
        pid, status = os.wait()
        if pid not in running:
            continue
        place = running.pop(pid)
        statuses[place] = os.waitstatus_to_exitcode(status)
        (folder / f"ended-{place}").touch()
        if statuses[place]:
            for other in running:
                os.kill(other, signal.SIGTERM)
    partial = folder / f"{STATUSES_FILE}.partial"
    partial.write_text(json.dumps(statuses))
    partial.replace(folder / STATUSES_FILE)
    return 0


def _die_with_parent() -> None:
    """Let this child, before it becomes its program, die when its parent does (prctl(2), Linux)."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(_main())
