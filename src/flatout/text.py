"""Text from files and programs, made fit for a terminal.

Standard library only: both halves load this.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_LONGEST = 600
"""Characters of a line that tells of a text of any length."""


def printable(text: str) -> str:
    """``text`` with escapes for what a terminal or a page would obey, hide or not show: control
    and direction characters, undecodable bytes of a command line. Line ends stay."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the known word that is spelled most like it, or
    nothing if none is."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""
