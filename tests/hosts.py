"""A host without a session: for tests of what stands on one."""

from __future__ import annotations

import os
from pathlib import Path

from flatout import knobs
from flatout.intercept.host import Host
from flatout.wire.request import Request
from flatout.wire.writer import RecordWriter


def host_in(folder: Path, request: Request | None = None) -> Host:
    """The host of this process, whose record goes into a folder.

    Args:
        folder: a run directory.
        request: what the controller asks for; by default, nothing.
    """
    return Host(request or Request(), RecordWriter(folder, os.getpid()), knobs.apply)
