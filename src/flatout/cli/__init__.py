"""The command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flatout import __version__
from flatout.cli.streams import BrokenOutputError, standard_streams
from flatout.cli.verbs import verbs
from flatout.errors import UserError
from flatout.text import printable


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="flatout",
        description="Makes PyTorch programs run as fast as the machine allows, and proves that "
        "they still compute the same thing.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flatout {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, module in verbs().items():
        usage = f"flatout {name} [options]" + (" -- COMMAND ..." if module.TAKES_JOB else "")
        subparser = subparsers.add_parser(
            name,
            help=module.SUMMARY,
            description=module.SUMMARY,
            usage=usage,
            allow_abbrev=False,
        )
        module.add_arguments(subparser)
        subparser.set_defaults(execute=module.execute, takes_job=module.TAKES_JOB)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status."""
    with standard_streams():
        try:
            try:
                return _run(list(sys.argv[1:] if argv is None else argv))
            finally:
                sys.stdout.flush()
        except BrokenOutputError as error:
            return error.exit_code  # nobody reads it, so nobody is told
        except UserError as error:
            print(f"flatout: {printable(str(error))}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("flatout: interrupted", file=sys.stderr)
            return 130


def _run(words: list[str]) -> int:
    own, separator, job = words, False, []
    if "--" in words:
        at = words.index("--")
        own, separator, job = words[:at], True, words[at + 1 :]
    arguments = build_parser().parse_args(own)
    if arguments.takes_job:
        if not job or not job[0]:
            raise UserError(
                "there is no command to run: put it after --, as in "
                f"flatout {arguments.verb} -- python train.py"
            )
        arguments.command = job
    elif separator:
        raise UserError(f"flatout {arguments.verb} takes no command")
    return int(arguments.execute(arguments))
