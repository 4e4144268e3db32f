"""``flatout tune``: finds the settings that are faster, proves them, and writes the plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flatout.cli import options
from flatout.cli.streams import say
from flatout.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flatout.machine import Ceilings
    from flatout.tune.ledger import Outcome

SUMMARY = "find the settings that make a program faster, prove them, and write them as a plan"
EXAMPLES = (
    "flatout tune python train.py",
    "flatout tune --budget 20m --plan big.toml torchrun --nproc-per-node 2 train.py",
    "flatout tune --exactness bitwise,reordered python train.py --epochs 3",
    "flatout tune --resume python train.py",
)
TAKES_JOB = True
ARGUMENT = ""

USUAL_BUDGETS = (
    "2.5 min for steps below 0.1 s, 8 min for steps of 2 s, 15 min for steps of 10 s; more if the "
    "program takes long to start"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout tune``."""
    options.add_budget(parser, None, "the time that the tune may take", USUAL_BUDGETS)
    options.add_plan(parser, "the file that the plan is written to")
    options.add_steps(
        parser,
        None,
        "prove the plan over this many steps (default: 200; if steps are fast, as many as fit into "
        "2 s, up to 2,000; if the budget is short, as few as 20, or 8 if steps are slow; if the "
        "program evaluates at regular intervals, a whole number of intervals)",
    )
    parser.add_argument(
        "--knobs",
        type=_knobs,
        metavar="KNOB,...",
        help="try only these knobs (default: all that may help); 'flatout knobs' lists all knobs",
    )
    parser.add_argument(
        "--exactness",
        type=_exactness,
        metavar="CLASS,...",
        help="try only settings of these classes (default: all); a class tells how far results may "
        "differ: bitwise (not at all), reordered (different order of sums), reduced (lower "
        "precision), resampled (different random numbers), reshuffled (different random numbers "
        "and order of the data)",
    )
    options.add_proof(parser, "tune")
    options.add_json(parser)
    options.add_verbose(
        parser, "every trial, every check, and the reason for every setting that was not used"
    )
    options.add_in_place(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Tune; the exit status is 0 with and without a plan, 130 after Ctrl-C, 143 after SIGTERM."""
    from flatout.launch import interruption

    with interruption.note_signals():
        return _tune(arguments)


def _tune(arguments: argparse.Namespace) -> int:
    from flatout import paths
    from flatout.errors import UserError
    from flatout.launch import interruption
    from flatout.launch.process import check_program
    from flatout.report import words
    from flatout.report.live import Progress
    from flatout.tune import journal, result
    from flatout.tune.ledger import Options
    from flatout.tune.pairs import MINIMUM_STEPS
    from flatout.tune.tuner import Tuner

    if arguments.steps is not None and arguments.steps < MINIMUM_STEPS:
        raise UserError(f"--steps must be at least {MINIMUM_STEPS}")
    for path in (arguments.plan, arguments.json):
        if path is not None:
            paths.check_writable(path)
    check_program(arguments.command[0])
    wanted = Options(
        budget_seconds=arguments.budget,
        steps=arguments.steps,
        seed=arguments.seed,
        isolate=not arguments.in_place,
        knobs=arguments.knobs,
        exactness=arguments.exactness,
        memory=arguments.memory,
    )
    opened = journal.open_journal("tune", arguments.command, wanted, arguments.resume, say)
    try:
        with Progress(quiet=arguments.quiet, verbose=arguments.verbose) as progress:

            def show(so_far: Outcome, left_s: float) -> None:
                progress.show(so_far.activity, left_s)

            tuner = Tuner(
                arguments.command, wanted, opened, progress.say, show, ceilings, progress.warn
            )
            outcome = tuner.run()
        document = result.make_document(
            arguments.command, arguments.plan, outcome, arguments.given_options
        )
        for line in words.lines(document, arguments.verbose):  # before writing: disks may be full
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
    """Write the plan with its proof.

    Raises:
        PlanError: the file cannot be written.
        UserError: the program has changed since its first run.
    """
    from flatout import machine, plan
    from flatout.errors import UserError
    from flatout.plan import program

    now = program.observe_program(command, outcome.modules)
    changes = [] if outcome.program is None else program.changes_between(outcome.program, now)
    if changes:
        raise UserError(
            "no plan is written, because the program has changed since its first run: "
            f"{program.summarize(changes)}"
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
    """Return the peak rates of this machine, as measured with an interpreter.

    If they cannot be measured, print a message, and return ``None``.

    Args:
        python: the path of the interpreter.
    """
    from flatout import machine
    from flatout.errors import UserError
    from flatout.launch import interruption

    try:
        with interruption.at_once():
            return machine.ceilings(python)
    except UserError as error:
        say(f"{error}; the machine's matmul and memory rates count as not measured")
        return None


def _knobs(text: str) -> tuple[str, ...]:
    from flatout import knobs
    from flatout.knob import UnknownSettingError

    names = tuple(text.split(","))
    try:
        for name in names:
            knobs.get(name)
    except UnknownSettingError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def _exactness(text: str) -> tuple[str, ...]:
    from flatout.knob import EXACTNESS

    classes = tuple(text.split(","))
    for name in classes:
        if name not in EXACTNESS:
            hint = did_you_mean(name, EXACTNESS) or f" (known: {', '.join(EXACTNESS)})"
            raise argparse.ArgumentTypeError(f"there is no class {name!r}{hint}")
    return classes
