"""``flatout tune``: find the settings that are faster, prove them, write the plan."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flatout.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flatout.machine import Ceilings
    from flatout.tune.ledger import Outcome

SUMMARY = "try settings, measure and prove them, and write the plan"
TAKES_JOB = True

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout tune``."""
    from flatout.plan import PLAN_FILE

    parser.add_argument(
        "--budget",
        type=_seconds,
        default=300.0,
        metavar="TIME",
        help="how long it may take, roughly: 90s, 5m, 1h (default: 5m)",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        default=Path(PLAN_FILE),
        metavar="FILE",
        help=f"where the plan is written (default: {PLAN_FILE})",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="steps for which the plan is proven (default: as the budget allows)",
    )
    parser.add_argument(
        "--knobs",
        type=_knobs,
        metavar="KNOB,...",
        help="try these only (default: all that match; 'flatout knobs' lists them)",
    )
    parser.add_argument(
        "--exactness",
        type=_exactness,
        metavar="CLASS,...",
        help="try settings of these classes only: bitwise, reordered, reduced, resampled, "
        "reshuffled (default: all)",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=1.1,
        metavar="X",
        help="peak memory that is allowed, as a multiple of the bare program's (default: 1.1)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with the last tune of this command that has not come to its end",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first pair (default: 0)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write what was found to this file"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="let the trials write to your files: each starts and stops the program half way",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Tune; the exit code is 0 with and without a plan, 130 after Ctrl-C, 143 after SIGTERM."""
    from flatout.launch import interruption

    with interruption.watched():
        return _tune(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    from flatout import paths
    from flatout.errors import UserError
    from flatout.launch import interruption
    from flatout.launch.process import check_program
    from flatout.report import words
    from flatout.report.live import LiveTable
    from flatout.tune import journal, result
    from flatout.tune.ledger import Options
    from flatout.tune.pairs import MINIMUM_STEPS
    from flatout.tune.tuner import Tuner

    if arguments.steps is not None and arguments.steps < MINIMUM_STEPS:
        raise UserError(f"--steps must be at least {MINIMUM_STEPS}")
    if not arguments.memory >= 1:
        raise UserError("--memory must be at least 1: that is what the bare program takes")
    for path in (arguments.plan, arguments.json):
        if path is not None:
            paths.check_writable(path)
    check_program(arguments.command[0])
    options = Options(
        budget_seconds=arguments.budget,
        steps=arguments.steps,
        seed=arguments.seed,
        isolate=not arguments.in_place,
        knobs=arguments.knobs,
        exactness=arguments.exactness,
        memory=arguments.memory,
    )
    opened = journal.opened("tune", arguments.command, options, arguments.resume, say)
    try:
        with LiveTable(quiet=arguments.quiet) as table:

            def show(so_far: Outcome, left_seconds: float) -> None:
                table.show(result.arms(so_far.arms, {}), left_seconds)

            outcome = Tuner(arguments.command, options, opened, table.say, show, ceilings).run()
        document = result.made(arguments.command, arguments.plan, outcome)
        for line in words.lines(document):  # first: a disk may be full by now
            say(line)
        if outcome.evidence is not None:
            write_plan(arguments.plan, arguments.command, outcome)
        if not outcome.interrupted:
            opened.finish(document.to_json())
    finally:
        opened.close()
    if arguments.json is not None:
        try:
            arguments.json.write_text(document.to_json(), "utf-8")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from error
    return interruption.exit_status() if outcome.interrupted else 0


def write_plan(path: Path, command: Sequence[str], outcome: Outcome) -> None:
    """Write down what has been proven.

    Raises:
        PlanError: the file cannot be written.
        UserError: the program has changed since its first run.
    """
    from flatout import machine, plan
    from flatout.errors import UserError
    from flatout.plan import program

    now = program.observed(command, outcome.modules)
    changes = [] if outcome.program is None else program.changes_between(outcome.program, now)
    if changes:
        raise UserError(
            f"no plan is written, as the program has changed meanwhile: "
            f"{program.summed_up(changes)}"
        )
    header = outcome.header
    facts: dict[str, plan.Fact] = {
        **machine.fingerprint(),
        "torch": header.torch,
    }
    if header.threads is not None:
        facts["threads"] = header.threads
    plan.Plan(
        settings=outcome.settings,
        command=tuple(command),
        program=now,
        inputs=outcome.inputs,
        machine=facts,
        evidence=outcome.evidence,
    ).write(path)


def ceilings(python: str) -> Ceilings | None:
    """What this machine can do for an interpreter; ``None``, and a line, if that is not to be had.

    Args:
        python: its path.
    """
    from flatout import machine
    from flatout.errors import UserError
    from flatout.launch import interruption

    try:
        with interruption.at_once():
            return machine.ceilings(python)
    except UserError as error:
        say(f"{error}; the machine's ceilings count as not measured")
        return None


def say(line: str) -> None:
    print(f"flatout: {printable(line)}", file=sys.stderr, flush=True)


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _knobs(text: str) -> tuple[str, ...]:
    from flatout import knobs

    names = tuple(text.split(","))
    for name in names:
        if name not in knobs.registry():
            known = ", ".join(knobs.registry())
            raise argparse.ArgumentTypeError(f"there is no knob {name!r} (known: {known})")
    return names


def _exactness(text: str) -> tuple[str, ...]:
    from flatout.knob import EXACTNESS

    classes = tuple(text.split(","))
    for name in classes:
        if name not in EXACTNESS:
            raise argparse.ArgumentTypeError(
                f"there is no class {name!r} (known: {', '.join(EXACTNESS)})"
            )
    return classes


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
