"""HTML and SVG made of elements. Text is escaped unless it is markup already."""

from __future__ import annotations

import html

from flatout.text import printable

_EMPTY = frozenset({"meta", "circle", "line", "path", "rect"})
"""Elements without an end tag, or without content."""


class Markup(str):
    """Text that is markup: what it was made of has been escaped."""

    __slots__ = ()


def element(tag: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        tag: its name.
        children: elements, or text that is escaped; ``None`` is left out.
        attributes: a trailing ``_`` is taken off a name, others become ``-``; ``None`` is left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{joined(*children)}</{tag}>")


def joined(*children: str | None) -> Markup:
    """Elements, or text that is escaped, one after the other."""
    return Markup("".join(escaped(child) for child in children if child is not None))


def escaped(text: str) -> Markup:
    """``text`` as it should be shown, whatever is in it."""
    return text if isinstance(text, Markup) else Markup(html.escape(printable(text)))


def with_code(markdown: str) -> Markup:
    """A sentence in Markdown of which only code between backticks is marked."""
    parts = markdown.split("`")
    if len(parts) % 2 == 0:  # a backtick without its other one
        return escaped(markdown)
    return joined(
        *(element("code", part) if number % 2 else part for number, part in enumerate(parts))
    )


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.6g}"
