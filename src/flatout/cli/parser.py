"""The parser of the command line: usage and help of all verbs, and where the command begins."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from flatout import __version__
from flatout.cli.verbs import Verb, verbs
from flatout.errors import UserError
from flatout.text import did_you_mean


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one sentence, a ``UserError``.

    Attributes:
        arguments: its options and positional arguments, in order.
        verbs: of the parser of all verbs, the parsers of each.
    """

    def __init__(self, **options: Any) -> None:
        self.arguments: list[argparse.Action] = []
        self.verbs: dict[str, Parser] = {}
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.arguments.append(action)
        return action

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def verb(self, name: str) -> Parser:
        """The parser of a verb.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.verbs:
            hint = did_you_mean(name, self.verbs) or f" (known: {', '.join(self.verbs)})"
            raise UserError(f"there is no verb {name!r}{hint}")
        return self.verbs[name]

    def split(self, words: Sequence[str]) -> tuple[list[str], list[str] | None]:
        """Split what stands after a verb into the verb's own words and the command.

        The command begins after ``--``, or at the first word that is neither an option nor the
        value of one, unless the verb has an argument of its own. It is ``None`` where neither is
        there.

        Raises:
            UserError: there is no such option.
        """
        takes_value = {
            name: action.nargs != 0 for action in self.arguments for name in action.option_strings
        }
        takes_command = any(action.dest == "command" for action in self.arguments)
        at = 0
        while at < len(words):
            name, has_value, _ = words[at].partition("=")
            if name == "--":
                return list(words[:at]), list(words[at + 1 :])
            if not name.startswith("-") or name == "-":
                if takes_command:
                    return list(words[:at]), list(words[at:])
                at += 1
            elif name in takes_value:
                at += 2 if takes_value[name] and not has_value else 1
            else:
                hint = did_you_mean(name, takes_value) or f" (see {self.prog} --help)"
                raise UserError(f"{self.prog} has no option {name}{hint}")
        return list(words), None


def build_parser() -> Parser:
    """The parser of all verbs."""
    parser = Parser(
        prog="flatout",
        description="Makes PyTorch programs run as fast as the machine allows, and proves that "
        "they still compute the same thing.",
        epilog=_examples(
            "flatout doctor python train.py",
            "flatout tune python train.py",
            "flatout run --plan flatout.toml python train.py",
        )
        + "\n\n'flatout help VERB' explains one verb.",
    )
    parser.add_argument("--version", action="version", version=f"flatout {__version__}")
    subparsers = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, parser_class=Parser
    )
    for name, verb in verbs().items():
        parser.verbs[name] = subparsers.add_parser(
            name,
            help=verb.SUMMARY,
            usage=_usage(name, verb),
            description=f"{verb.SUMMARY[0].upper()}{verb.SUMMARY[1:]}.",
            epilog=_examples(*verb.EXAMPLES),
        )
        verb.add_arguments(parser.verbs[name])
        if verb.TAKES_JOB:
            parser.verbs[name].add_argument(
                "command",
                nargs="*",
                metavar="COMMAND",
                help="the command as you would type it without flatout; you may put -- before it",
            )
        parser.verbs[name].set_defaults(verb=name, execute=verb.execute, takes_job=verb.TAKES_JOB)
    return parser


def _usage(name: str, verb: Verb) -> str:
    ending = "[--] COMMAND ..." if verb.TAKES_JOB else verb.ARGUMENT
    return f"flatout {name} [options] {ending}".rstrip()


def _examples(*commands: str) -> str:
    return "\n".join(["examples:", *(f"  {command}" for command in commands)])
