"""The pages of the documentation that are made from the code: one for each verb and each knob.

``python -m flatout.cli.pages docs`` writes them (``make docs``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flatout import knobs
from flatout.cli.parser import Parser, build_parser
from flatout.cli.verbs import verbs
from flatout.report import card


def write_pages(docs: Path) -> None:
    """Write all pages into the folder of the documentation; those of what is gone are removed."""
    card.write_pages(docs / "knobs")
    (docs / "knobs" / "index.md").write_text(list_knobs(), "utf-8")
    folder = docs / "verbs"
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"index.md": list_verbs(), **{f"{name}.md": describe(name) for name in verbs()}}
    for page in folder.glob("*.md"):
        if page.name not in pages:
            page.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, "utf-8")


def list_knobs() -> str:
    """The page that lists the knobs."""
    rows = [
        f"| [{name}]({name}.md) | {knob.summary} | {', '.join(f'`{s}`' for s in knob.settings)} | "
        f"{', '.join(knob.platforms)} |"
        for name, knob in knobs.registry().items()
    ]
    head = ["| knob | what it does | settings | devices |", "| --- | --- | --- | --- |"]
    return "\n".join(
        [
            "# Knobs",
            "",
            "A knob is one aspect of a program that flatout can change, such as the precision of",
            "its matmuls. `flatout tune` tries the settings that may help, and",
            "`flatout run --set KNOB=SETTING` applies one that you choose.",
            "",
            *head,
            *rows,
            "",
        ]
    )


def list_verbs() -> str:
    """The page that lists the verbs."""
    rows = [f"| [{name}]({name}.md) | {verb.SUMMARY} |" for name, verb in verbs().items()]
    return "\n".join(["# Verbs", "", "| verb | what it does |", "| --- | --- |", *rows, ""])


def describe(name: str) -> str:
    """The page of a verb."""
    verb, parser = verbs()[name], build_parser().verbs[name]
    return "\n".join(
        [
            f"# flatout {name}",
            "",
            f"{verb.SUMMARY[0].upper()}{verb.SUMMARY[1:]}.",
            "",
            f"    {parser.format_usage().removeprefix('usage: ').strip()}",
            "",
            "| option | what it does |",
            "| --- | --- |",
            *_rows(parser),
            "",
            "## Examples",
            "",
            *(f"    {command}" for command in verb.EXAMPLES),
            "",
        ]
    )


def _rows(parser: Parser) -> list[str]:
    rows = []
    for action in parser.arguments:
        if action.help is None or action.help == argparse.SUPPRESS:
            continue
        names = ", ".join(action.option_strings) or str(action.metavar or action.dest)
        value = f" {action.metavar}" if action.option_strings and action.metavar else ""
        text = (action.help % {"default": action.default}).replace("|", "\\|")
        rows.append(f"| `{names}{value}` | {text} |")
    return rows


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
