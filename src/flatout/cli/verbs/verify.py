"""``flatout verify``: put a plan to the proof again, at any length."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatout.plan import Plan

SUMMARY = "prove a plan again, for as many steps and seeds as wanted"
TAKES_JOB = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout verify``."""
    from flatout.plan import PLAN_FILE

    parser.add_argument(
        "--plan",
        type=Path,
        default=Path(PLAN_FILE),
        metavar="FILE",
        help="the plan; if it passes, the new proof is added to what is written in it, or takes "
        f"the place of one that covers less (default: {PLAN_FILE})",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps of each run (default: as in the plan's proof, or 200)",
    )
    parser.add_argument(
        "--seeds", type=int, default=5, metavar="K", help="pairs of runs, a seed each (default: 5)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="the first of them (default: 0)"
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=1.1,
        metavar="X",
        help="peak memory that is allowed, as a multiple of the bare program's (default: 1.1)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the verdict")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the last one that was interrupted"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="let the runs write to your files: each starts and stops the program half way",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Verify; the exit code is 0 if the plan passes, 1 if it does not, 130 after Ctrl-C, 143 after
    SIGTERM."""
    from flatout.launch import interruption

    with interruption.watched():
        return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from flatout import paths, plan
    from flatout.cli.verbs import tune
    from flatout.errors import UserError
    from flatout.launch import interruption
    from flatout.launch.process import check_program
    from flatout.report import words
    from flatout.report.live import LiveTable
    from flatout.tune import evidence, journal, result
    from flatout.tune.bare import USUAL_STEPS
    from flatout.tune.ledger import Options
    from flatout.tune.pairs import MINIMUM_STEPS
    from flatout.tune.tuner import Tuner

    proven = plan.read(arguments.plan)
    paths.check_writable(arguments.plan)
    check_program(arguments.command[0])
    if not proven.settings:
        raise UserError(f"{arguments.plan} turns nothing, so there is nothing to prove")
    steps = arguments.steps or (proven.evidence.steps if proven.evidence else USUAL_STEPS)
    if steps < MINIMUM_STEPS:
        raise UserError(f"--steps must be at least {MINIMUM_STEPS}")
    if arguments.seeds < 2:
        raise UserError("--seeds must be at least 2")
    options = Options(
        steps=steps,
        seed=arguments.seed,
        isolate=not arguments.in_place,
        memory=arguments.memory,
    )
    opened = journal.opened("verify", arguments.command, options, arguments.resume, tune.say)
    try:
        with LiveTable(quiet=arguments.quiet) as table:
            tuner = Tuner(
                arguments.command, options, opened, table.say, lambda _, left_s: None, tune.ceilings
            )
            outcome = tuner.verify(proven.settings, arguments.seeds)
        done = f"written into {arguments.plan}"
        is_written = outcome.evidence is not None and not outcome.interrupted
        if is_written and _is_of_these_conditions(proven, arguments.command):
            assert outcome.evidence is not None
            assert proven.evidence is not None
            outcome.evidence, how = evidence.merged(
                proven.evidence, outcome.evidence, arguments.seed
            )
            done += f" {how}"
        if is_written:
            tune.write_plan(arguments.plan, arguments.command, outcome)
        if not outcome.interrupted:
            opened.finish()
    finally:
        opened.close()
    document = result.made(arguments.command, arguments.plan, outcome)
    if document.claim is not None:
        tune.say(words.claim_line(document))
    for line in words.proof_lines(document.proof) if document.proof is not None else ():
        tune.say(line)
    if outcome.interrupted:
        tune.say(
            f"it was interrupted; {arguments.plan} stays as it was, and 'flatout verify --resume' "
            "goes on"
        )
    elif outcome.evidence is None:
        tune.say(outcome.why)
    else:
        tune.say(f"proven, {done}")
    if outcome.interrupted:
        return interruption.exit_status()
    return 0 if outcome.evidence is not None else 1


def _is_of_these_conditions(proven: Plan, command: Sequence[str]) -> bool:
    """Whether the plan has a proof of what it holds, of this program, on this machine."""
    from flatout import machine

    return (
        proven.proven
        and tuple(command) == proven.command
        and not proven.differences(command, machine.fingerprint())
    )
