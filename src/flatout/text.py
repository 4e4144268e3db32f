"""Text from files and programs, made fit for a terminal.

Standard library only: both halves load this.
"""

from __future__ import annotations

import re
from typing import Any

_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters but tab and line feed, those that turn the direction of text, surrogates."""

_LONGEST = 600
"""Characters of a line that tells of a text of any length."""


def printable(text: str) -> str:
    """A text without control characters: each stands there as an escape, such as ``\\x1b``."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def one_line(text: object) -> str:
    """The same in one line, cut off where it is very long."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def with_printable(value: Any) -> Any:
    """A document of dicts, lists and strings in which every string is printable.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(value, str):
        return value if value.isprintable() else printable(value)
    if isinstance(value, list):
        return [with_printable(item) for item in value]
    if isinstance(value, dict):
        return {with_printable(key): with_printable(item) for key, item in value.items()}
    return value
