"""Mistakes that the user can set right: one sentence, no traceback."""

from __future__ import annotations


class UserError(ValueError):
    """What ``cli.main`` prints as ``flatout: MESSAGE`` before it exits with ``exit_code``.

    Args:
        message: one sentence.
        exit_code: of the process, not 0.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RefusedError(Exception):
    """A knob can do nothing here, or the program has made the choice itself; one sentence."""
