"""Makes HTML and SVG from elements. Text is escaped unless it is markup already."""

from __future__ import annotations

import html

from flatout.text import printable

_EMPTY = frozenset({"meta", "circle", "line", "path", "rect"})
"""Elements that have no end tag or no content."""


class Markup(str):
    """Text that is markup: all text in it is escaped."""

    __slots__ = ()


def element(tag: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """Make an element.

    Args:
        tag: its name.
        children: elements, or text to be escaped; ``None`` is left out.
        attributes: a trailing ``_`` of a name is removed, any other ``_`` becomes ``-``; ``None``
            is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(*children)}</{tag}>")


def join(*children: str | None) -> Markup:
    """Join elements, and text that is escaped."""
    return Markup("".join(escape(child) for child in children if child is not None))


def escape(text: str) -> Markup:
    """Escape ``text``, so that it is shown as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text)))


def with_code(markdown: str) -> Markup:
    """Make markup of a sentence in Markdown that has code between backticks, and nothing else."""
    parts = markdown.split("`")
    if len(parts) % 2 == 0:  # a backtick is missing
        return escape(markdown)
    return join(
        *(element("code", part) if number % 2 else part for number, part in enumerate(parts))
    )


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
