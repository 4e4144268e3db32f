"""``flatout completion``: prints a script with which a shell completes verbs, options and files."""

from __future__ import annotations

import argparse
from pathlib import Path

from flatout.errors import UserError

SUMMARY = "print the script that completes flatout's verbs and options in your shell"
EXAMPLES = (
    'eval "$(flatout completion bash)"      # in ~/.bashrc',
    'eval "$(flatout completion zsh)"       # in ~/.zshrc, after compinit',
    "flatout completion fish | source       # in ~/.config/fish/config.fish",
)
TAKES_JOB = False
ARGUMENT = "SHELL"

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument of ``flatout completion``."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))


def execute(arguments: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        UserError: shtab, which writes it, is not installed.
    """
    try:
        import shtab  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError("completion needs shtab: pip install 'flatout[completion]'", 1) from None
    from flatout.cli.parser import build_parser

    parser = build_parser()
    for verb in parser.verbs.values():
        for argument in verb.arguments:
            if argument.type is Path or argument.dest == "command":
                argument.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, arguments.shell))
    return 0
