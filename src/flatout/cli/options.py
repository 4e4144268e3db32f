"""Options that several verbs share: each is declared once, so that it means the same everywhere."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from flatout.plan import PLAN_FILE
from flatout.tune import memory

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}


def positive(text: str) -> int:
    """An integer above 0, from a word of the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def duration_s(text: str) -> float:
    """Seconds, from a word such as ``90s``, ``5m`` or ``1h``; a bare number is in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 5m or 1h")
    return float(match[1]) * _UNITS_S[match[2]]


def speedup(text: str) -> float:
    """A speedup above 0, from a word such as ``1.2`` or ``1.2x``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x?", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a speedup such as 1.2")
    return float(match[1])


def memory_ratio(text: str) -> float:
    """A multiple of the bare program's peak memory, at least 1."""
    try:
        ratio = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not ratio >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1, the bare program's own memory")
    return ratio


def add_budget(
    parser: argparse.ArgumentParser, default_s: float | None, limits: str, default: str = ""
) -> None:
    """``--budget TIME``.

    Args:
        parser: the parser of the verb.
        default_s: the default in seconds; ``None`` if it depends on the program.
        limits: what the budget limits, in words.
        default: the default in words, if it depends on the program.
    """
    if default_s is not None:
        default = _time(default_s)
    parser.add_argument(
        "--budget",
        type=duration_s,
        default=default_s,
        metavar="TIME",
        help=f"{limits}; for example 90s, 5m or 1h (default: {default})",
    )


def add_steps(parser: argparse.ArgumentParser, default: int | None, meaning: str) -> None:
    """``--steps N``."""
    parser.add_argument("--steps", type=positive, default=default, metavar="N", help=meaning)


def add_plan(parser: argparse.ArgumentParser, meaning: str, *, has_default: bool = True) -> None:
    """``--plan FILE``."""
    parser.add_argument(
        "--plan",
        type=Path,
        default=Path(PLAN_FILE) if has_default else None,
        metavar="FILE",
        help=f"{meaning} (default: {PLAN_FILE})" if has_default else meaning,
    )


def add_set(parser: argparse.ArgumentParser, purpose: str) -> None:
    """``--set KNOB=SETTING``, which may be repeated."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=SETTING",
        help=f"{purpose}; may be repeated ('flatout knobs' lists all)",
    )


def add_ranks(parser: argparse.ArgumentParser, meaning: str, default: str) -> None:
    """``--ranks N``; ``default`` describes what ``None`` means, the value without this option."""
    parser.add_argument(
        "--ranks",
        type=positive,
        metavar="N",
        help=f"(new, see docs/ranks.md) {meaning} (default: {default})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json FILE``."""
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="also write the result to this file, as JSON"
    )


def add_python(
    parser: argparse.ArgumentParser, default: str = "the first python on PATH that has torch"
) -> None:
    """``--python FILE``; ``default`` says which interpreter is used without this option."""
    parser.add_argument(
        "--python",
        metavar="FILE",
        help=f"the interpreter that runs your programs (default: {default})",
    )


def add_in_place(parser: argparse.ArgumentParser) -> None:
    """``--in-place``, of verbs that stop the program before its end."""
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="run on your real files instead of a copy-on-write view of them; the program, which "
        "flatout stops after some steps, may then overwrite your files, such as checkpoints",
    )


def add_verbose(parser: argparse.ArgumentParser, extra: str) -> None:
    """``-v``; ``extra`` says what is printed in addition to the result."""
    parser.add_argument("-v", "--verbose", action="store_true", help=f"also print {extra}")


def add_proof(parser: argparse.ArgumentParser, verb: str) -> None:
    """What tune and verify share: ``--seed``, ``--memory``, ``--resume``, ``--quiet``."""
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the first baseline/plan pair of runs (default: 0); later pairs use S+1, S+2, "
        "...; a seed shifts the seeds that the program itself sets, and 0 leaves them unchanged",
    )
    parser.add_argument(
        "--memory",
        type=memory_ratio,
        default=memory.ALLOWED,
        metavar="X",
        help="peak memory that the plan may have, as a multiple of the bare program's (default: "
        f"{memory.ALLOWED:g}; if X is at least {memory.ALLOWED:g}, the plan may in any case take "
        f"{memory.CONSTANT_BYTES >> 20} MiB more than the bare program)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"continue the last interrupted {verb} of this command",
    )
    parser.add_argument("--quiet", action="store_true", help="print the result only, no progress")


def _time(seconds: float) -> str:
    return f"{seconds / 60:g}m" if seconds % 60 == 0 else f"{seconds:g}s"
