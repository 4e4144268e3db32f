"""The half of flatout that lives inside the user's process. ``activate`` is its door.

Imports the standard library, the user's own torch and the parts of the package that it stands on
(``intercept``, ``knobs``, ``kernels``, ``wire``), nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path

from flatout.wire.request import RUN_VARIABLE, Request

_session: object | None = None


def activate() -> None:
    """Start to watch this process; called once, right after torch was imported.

    Never raises: when the agent cannot start, one line on stderr says so and the program goes on.
    """
    global _session
    if _session is not None or sys.version_info < (3, 10):
        return
    try:
        from flatout.agent.session import Session

        run_directory = Path(os.environ[RUN_VARIABLE])
        request = Request.read(run_directory)
        if request.relay is not None:
            from flatout.agent import relay

            relay.wait_to_begin(request.relay)
        session = Session(request, run_directory)
        session.start()
        _session = session
    except Exception as error:  # noqa: BLE001 - said aloud, with its traceback on request
        _say(f"flatout: the agent did not start: {type(error).__name__}: {error}\n")
        if os.environ.get("FLATOUT_DEBUG") == "1":
            _say(traceback.format_exc())


def _say(text: str) -> None:
    """Write to stderr past the program's buffers, which keep what cannot be written for its end."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno(), text.encode("utf-8", "backslashreplace"))
