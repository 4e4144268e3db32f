"""``flatout compare``: what takes longer now than before, from two diagnoses."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flatout.cli import options
from flatout.cli.streams import say

SUMMARY = "compare two diagnoses of a program: what takes longer now"
EXAMPLES = (
    "flatout compare last-week.json today.json",
    "flatout compare --at-most 1.05 before.json ~/.local/state/flatout/runs/RUN",
)
TAKES_JOB = False
ARGUMENT = "BEFORE NOW"

AT_MOST = 1.1
"""How many times as long a step may take: runs of one program differ by less on a quiet machine."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout compare``."""
    for name in ("before", "now"):
        parser.add_argument(
            name,
            type=Path,
            metavar=name.upper(),
            help="what 'flatout doctor --json FILE' wrote, or the folder of the record of a run",
        )
    parser.add_argument(
        "--at-most",
        type=options.speedup,
        default=AT_MOST,
        metavar="X",
        help="exit with 1 if a step now takes more than X times as long, so that scripts can ask "
        f"for it (default: {AT_MOST:g})",
    )
    options.add_json(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Compare, and print the comparison."""
    from flatout import paths
    from flatout.doctor import comparison
    from flatout.report.comparison import print_comparison

    if arguments.json is not None:
        paths.check_writable(arguments.json)
    found = comparison.compare(comparison.read(arguments.before), comparison.read(arguments.now))
    print_comparison(found, sys.stdout)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.document(), indent=1) + "\n")
    ratio = found.step_ms.ratio
    if ratio is None or ratio <= arguments.at_most:
        return 0
    say(f"a step takes {ratio:.2f}x as long, more than the {arguments.at_most:g}x of --at-most")
    return 1
