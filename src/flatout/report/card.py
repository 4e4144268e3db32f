"""Render a knob's card as Markdown, for the terminal and for the pages under ``docs/knobs/``."""

from __future__ import annotations

from pathlib import Path

from flatout import knobs
from flatout.knob import EXACTNESS, Knob


def markdown(knob: Knob) -> str:
    """Render the page of a knob."""
    card = knob.card
    settings = "\n".join(
        f"- `{knob.name}={setting}`: {knob.exactness[setting]} "
        f"({EXACTNESS[knob.exactness[setting]]})"
        for setting in knob.settings
    )
    when = "between two steps of a running process" if knob.hot else "only when a process starts"
    sources = "\n".join(f"- {source}" for source in card.sources)
    return f"""# {knob.name}

{knob.summary[0].upper()}{knob.summary[1:]}.

{settings}

The knob can be applied {when}. Devices: {", ".join(knob.platforms)}.

## What it does

{card.what}

## When it helps

{card.helps}

## When it hurts

{card.hurts}

## By hand

{card.by_hand}

## Sources

{sources}
"""


def write_pages(folder: Path) -> None:
    """Write one page for each knob, and remove pages of knobs that no longer exist."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{name}.md": markdown(knob) for name, knob in knobs.registry().items()}
    for page in folder.glob("*.md"):
        if page.name not in pages:
            page.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, "utf-8")
