"""The half of flatout that runs inside the user's process. ``activate`` starts it.

It imports only the standard library, the user's torch, and the packages of flatout below it
(``knobs``, ``knob``, ``intercept``, ``wire``, ``machine``, ``errors``).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from pathlib import Path

from flatout.wire.request import RUN_VARIABLE, Request

_session: object | None = None

_MODULES_OF = {
    "seed": ("seeds",),
    "comparison": ("switch", "learning"),
    "relay": ("relay",),
    "profile_steps": ("profile",),
    "inspection": ("inspection",),
    "guard": ("guard",),
}
"""The modules of the agent that each field of a request needs if it differs from its default."""


def import_modules() -> None:
    """Import the modules that ``activate`` and the stages of this run need.

    The start-up hook calls this beforehand in a thread of its own, because the memory of these
    modules must not lie between the program's blocks (``launch/hook/sitecustomize.py``).

    Raises:
        Exception: whatever importing raises; ``activate`` fails by the same, and reports it.
    """
    from flatout.agent import session  # noqa: F401

    request = Request.read(Path(os.environ[RUN_VARIABLE]))
    for field, names in _MODULES_OF.items():
        if getattr(request, field) != getattr(Request(), field):
            for name in names:
                importlib.import_module(f"{__name__}.{name}")


def activate() -> None:
    """Start the agent in this process. Called once, right after torch has been imported.

    This never raises. If the agent cannot start, one line on stderr says so, and the program goes
    on.
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
    except Exception as error:  # noqa: BLE001 - printed, with its traceback on request
        _write_to_stderr(f"flatout: the agent did not start: {type(error).__name__}: {error}\n")
        if os.environ.get("FLATOUT_DEBUG") == "1":
            _write_to_stderr(traceback.format_exc())


def _write_to_stderr(text: str) -> None:
    """Write to stderr without the buffer of ``sys.stderr``, which would keep the text after an
    error."""
    if sys.__stderr__ is not None:
        with contextlib.suppress(OSError, ValueError):
            os.write(sys.__stderr__.fileno(), text.encode("utf-8", "backslashreplace"))
