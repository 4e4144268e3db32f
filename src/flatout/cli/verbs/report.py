"""``flatout report``: writes what a tune found as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from flatout.cli.streams import say

SUMMARY = "write what a tune found as one HTML page"
EXAMPLES = ("flatout report", "flatout report found.json --html found.html")
TAKES_JOB = False
ARGUMENT = "[FILE]"

PAGE_FILE = "flatout-report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout report``."""
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE",
        help="what 'flatout tune --json FILE' wrote (default: the result of the last tune)",
    )
    parser.add_argument(
        "--html",
        type=Path,
        default=Path(PAGE_FILE),
        metavar="FILE",
        help=f"where the page is written (default: {PAGE_FILE})",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Write the page."""
    from flatout import paths
    from flatout.errors import UserError
    from flatout.report import page
    from flatout.tune.document import Document

    paths.check_writable(arguments.html)
    document = Document.read(arguments.file or _newest())
    try:
        arguments.html.write_text(page.html(document), "utf-8")
    except OSError as error:
        raise UserError(f"{arguments.html} cannot be written: {error.strerror}") from error
    say(f"the report is in {arguments.html}")
    return 0


def _newest() -> Path:
    """The file with the result of the last tune.

    Raises:
        UserError: no tune has ended yet.
    """
    from flatout import paths
    from flatout.errors import UserError
    from flatout.tune.document import DOCUMENT_FILE

    found = list(paths.tunes_directory().glob(f"*/{DOCUMENT_FILE}"))
    if not found:
        raise UserError(
            "no tune has been finished yet: run flatout tune first, or name a file that "
            "'flatout tune --json' wrote"
        )
    return max(found, key=lambda file: file.stat().st_mtime)
