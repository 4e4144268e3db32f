"""The command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from flatout.cli.parser import build_parser
from flatout.cli.streams import BrokenOutputError, standard_streams
from flatout.errors import UserError
from flatout.text import printable

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    with standard_streams():
        try:
            try:
                return _run(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()
        except BrokenOutputError as error:
            return error.exit_code  # nobody reads the output, so nobody would read a message
        except UserError as error:
            print(f"flatout: {printable(str(error))}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("flatout: interrupted", file=sys.stderr)
            return 130


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    parser = build_parser()
    if not words or words[0].startswith("-"):
        parser.parse_args(words or ["--help"])
    verb = parser.verb(words[0])
    own, command = verb.split(words[1:])
    arguments = verb.parse_args(own)
    if not arguments.takes_job and command is not None:
        raise UserError(f"flatout {words[0]} takes no command")
    if arguments.takes_job:
        if not command or not command[0]:
            raise UserError(
                f"there is no command to run; it stands at the end, as in: flatout {words[0]} "
                "python train.py"
            )
        arguments.command = command
        arguments.given_options = own
    return int(arguments.execute(arguments))
