"""The notes that ranks leave for each other in their run directories, on several hosts.

The processes of one host read and write files of one run directory: that they have begun, where
they can be met, that they have ended or failed. With several hosts each rank has a run directory of
its own, and its flatout copies what is noted in it to those of the others.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
from pathlib import Path

from flatout.launch.companion_stage import STATUS_PREFIX

_NOTE = re.compile(r"(begun|imported|port|alone|ended|died|gone)-\d+(-\d+)?")


class Notes:
    """The notes in a run directory.

    Args:
        run_directory: of one rank.
    """

    def __init__(self, run_directory: Path) -> None:
        self._run_directory = run_directory
        self._known: set[str] = set()

    def take_new(self) -> dict[str, str]:
        """Return the notes that were left in this run directory since the last call, by name."""
        found = {}
        with contextlib.suppress(OSError):  # the user has removed it
            for name in sorted(set(os.listdir(self._run_directory)) - self._known):
                if _NOTE.fullmatch(name):
                    found[name] = (self._run_directory / name).read_text("utf-8", "replace")
        self._known |= found.keys()
        return found

    def add(self, name: str, text: str) -> bool:
        """Leave a note of another rank in this run directory, if it is one and is not known yet;
        return whether that is so."""
        if not _NOTE.fullmatch(name) or name in self._known:
            return False
        self._known.add(name)
        partial = self._run_directory / f"{name}.partial"
        with contextlib.suppress(OSError):  # the disk is full: others can still be told
            partial.write_text(text, "utf-8")
            partial.replace(self._run_directory / name)
        return True


def lost(rank: int, address: str) -> tuple[str, str]:
    """Return the name and the text of the note that a rank cannot be reached any more. It counts as
    killed, see ``companion_stage.STATUS_PREFIX``."""
    return f"{STATUS_PREFIX}{rank}", f"the connection to {address} is lost\n{-signal.SIGKILL}\n"


def located(name: str, text: str, address: str, output: Path) -> str:
    """Return a note as other hosts get it: how a rank has failed, with where that was.

    Args:
        name, text: of the note.
        address: of this host.
        output: the file that holds the output of the rank.
    """
    if not name.startswith(STATUS_PREFIX):
        return text
    how, _, returncode = text.partition("\n")
    return f"{how} (on {address}, output: {output})\n{returncode}"
