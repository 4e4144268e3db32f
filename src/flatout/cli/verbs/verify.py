"""``flatout verify``: proves a plan again, over any number of steps, or only times it again."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from flatout.cli import options
from flatout.cli.streams import say

if TYPE_CHECKING:
    from flatout.plan import Plan
    from flatout.tune.journal import Journal
    from flatout.tune.ledger import Options, Outcome
    from flatout.wire.ratios import Ratio

SUMMARY = "prove a plan again, over as many steps and seeds as you want, or only time it again"
EXAMPLES = (
    "flatout verify python train.py",
    "flatout verify --plan big.toml --steps 2000 --seeds 8 python train.py",
    "flatout verify --at-least 1.2 python train.py",
    "flatout verify --speed python train.py",
    "flatout verify --speed --at-least 1.2 python train.py",
)
TAKES_JOB = True
ARGUMENT = ""

DEFAULT_SEEDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout verify``."""
    options.add_plan(
        parser,
        "the file of the plan; a proof that passes replaces the one in the file if it covers it, "
        "and is stored beside it otherwise",
    )
    options.add_steps(
        parser, None, "prove the plan over this many steps (default: as in its last proof, or 200)"
    )
    parser.add_argument(
        "--seeds",
        type=options.positive,
        default=DEFAULT_SEEDS,
        metavar="K",
        help="number of baseline/plan pairs of runs, each with its own seed "
        f"(default: {DEFAULT_SEEDS})",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="only measure the speed again, in about a minute if steps are short, and compare it "
        "with the plan's; nothing is proven, and the plan stays as it is; end with 1 unless the "
        "measured speedup is a gain and its interval reaches the claimed one (or, with --at-least, "
        "X)",
    )
    parser.add_argument(
        "--at-least",
        type=options.speedup,
        metavar="X",
        help="end with 1 unless the whole interval of the measured speedup is at or above X, such "
        "as 1.2",
    )
    options.add_proof(parser, "verify")
    options.add_verbose(parser, "every run and every check")
    options.add_in_place(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Verify; the exit status is 0 if the plan passes (with ``--speed``: if the measured speedup is
    what it should be, see ``speed.Comparison``), 1 if it does not or is not as fast as it is to be,
    130 after Ctrl-C, and 143 after SIGTERM."""
    from flatout.launch import interruption

    with interruption.note_signals():
        return _verify(arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from flatout import paths, plan
    from flatout.launch import interruption
    from flatout.launch.process import check_program
    from flatout.tune import journal

    proven = plan.read(arguments.plan)
    check_program(arguments.command[0])
    if arguments.speed:
        return _measure_speed(arguments, proven)
    paths.check_writable(arguments.plan)
    wanted = _options(arguments, proven)
    opened = journal.open_journal("verify", arguments.command, wanted, arguments.resume, say)
    try:
        outcome = _prove(arguments, wanted, opened, proven)
        if outcome.interrupted:
            continues = journal.format_resume_command(
                "verify", arguments.given_options, arguments.command
            )
            verdict = (
                f"it was interrupted; {arguments.plan} stays as it was; to continue: {continues}"
            )
        elif outcome.evidence is None:
            verdict = outcome.why
        else:
            verdict = f"proven, {_write(arguments, proven, outcome)}"
        if not outcome.interrupted:
            opened.finish()
    finally:
        opened.close()
    say(verdict)
    claim = _print_proof(arguments, outcome)
    if outcome.interrupted:
        return interruption.exit_status()
    too_slow = find_shortfall(claim, arguments.at_least)
    if too_slow is not None:
        say(too_slow)
    return 0 if outcome.evidence is not None and too_slow is None else 1


def _measure_speed(arguments: argparse.Namespace, proven: Plan) -> int:
    """Measure the speed of the plan again; for the exit status see ``execute``."""
    from flatout.errors import UserError
    from flatout.launch import interruption
    from flatout.report.live import Progress
    from flatout.tune import formatting, journal, speed

    if arguments.resume:
        raise UserError("--speed begins anew each time: leave out --resume")
    wanted = replace(_options(arguments, proven), steps=arguments.steps)
    lasts_s = speed.estimate_before_s(proven.evidence, arguments.seeds, arguments.steps)
    say(f"measuring the speed of {arguments.plan} again takes about {_minutes(lasts_s)}")
    opened = journal.open_journal("verify", arguments.command, wanted, False, say)
    try:
        with Progress(quiet=arguments.quiet, verbose=arguments.verbose) as progress:
            finished = speed.measure(
                arguments.command,
                proven.settings,
                arguments.seeds,
                wanted,
                opened,
                progress.say,
                lambda so_far, left_s: progress.show(so_far.activity, left_s),
                progress.warn,
            )
        opened.finish()
    except KeyboardInterrupt:
        opened.finish()
        return interruption.exit_status()
    finally:
        opened.close()
    for name, why in finished.without_effect().items():
        say(f"{name}={proven.settings[name]} has no effect: {why}")
    if finished.count < 2:
        say(finished.failure or "it was interrupted before two pairs were complete")
        return interruption.exit_status() if finished.interrupted else 1
    found = speed.Comparison(
        speed.claimed_by(proven.evidence),
        finished.ratio,
        arguments.at_least,
        finished.quietness.why_not_measurable,
    )
    for line in found.lines:
        say(line)
    bare, with_plan = finished.costs
    say(
        f"a step takes {formatting.milliseconds(bare.step_ms)} bare, "
        f"{formatting.milliseconds(with_plan.step_ms)} with the plan"
    )
    if finished.interrupted:
        return interruption.exit_status()
    return 0 if found.holds else 1


def _minutes(seconds: float) -> str:
    return "a minute" if seconds <= 60 else f"{seconds / 60:.0f} min"


def _options(arguments: argparse.Namespace, proven: Plan) -> Options:
    """The options of the prover.

    Raises:
        UserError: there is nothing to prove, or too little to prove it with.
    """
    from flatout.errors import UserError
    from flatout.tune.ledger import Options
    from flatout.tune.pairs import MINIMUM_STEPS

    if not proven.settings:
        raise UserError(f"{arguments.plan} has no settings, so there is nothing to prove")
    if arguments.steps is not None and arguments.steps < MINIMUM_STEPS:
        raise UserError(f"--steps must be at least {MINIMUM_STEPS}")
    if arguments.seeds < 2:
        raise UserError("--seeds must be at least 2")
    return Options(
        steps=arguments.steps or (proven.evidence.steps if proven.evidence else None),
        seed=arguments.seed,
        isolate=not arguments.in_place,
        memory=arguments.memory,
    )


def _prove(
    arguments: argparse.Namespace, wanted: Options, opened: Journal, proven: Plan
) -> Outcome:
    """Make the runs of the proof, and judge them."""
    from flatout.cli.verbs import tune
    from flatout.report.live import Progress
    from flatout.tune.tuner import Tuner

    with Progress(quiet=arguments.quiet, verbose=arguments.verbose) as progress:

        def show(so_far: Outcome, left_s: float) -> None:
            is_proof = so_far.activity is not None and so_far.activity.pairs is not None
            progress.show(so_far.activity, left_s if is_proof else None)

        tuner = Tuner(
            arguments.command, wanted, opened, progress.say, show, tune.ceilings, progress.warn
        )
        return tuner.verify(proven.settings, arguments.seeds)


def _write(arguments: argparse.Namespace, proven: Plan, outcome: Outcome) -> str:
    """Write the plan with its new proof; returns where it is, in words."""
    from flatout.cli.verbs import tune
    from flatout.tune import evidence

    said = f"written into {arguments.plan}"
    if _is_of_these_conditions(proven, arguments.command):
        assert outcome.evidence is not None
        assert proven.evidence is not None
        outcome.evidence, how = evidence.merge(proven.evidence, outcome.evidence, arguments.seed)
        said += f": {how}"
    tune.write_plan(arguments.plan, arguments.command, outcome)
    return said


def find_shortfall(claim: Ratio | None, at_least: float | None) -> str | None:
    """Return that a speedup is not shown to be large enough; ``None``: it is, or need not be.

    Args:
        claim: the measured speedup.
        at_least: what it must be.
    """
    if at_least is None:
        return None
    if claim is None:
        return f"no speedup is proven, so it is not shown to be at least {at_least:g}x"
    if claim.low >= at_least:
        return None
    return f"the speedup of {claim} is not shown to be at least {at_least:g}x"


def _print_proof(arguments: argparse.Namespace, outcome: Outcome) -> Ratio | None:
    """Print the speedup and the proof; returns the speedup."""
    from flatout.report import words
    from flatout.tune import result

    document = result.make_document(arguments.command, arguments.plan, outcome)
    if document.claim is not None or document.quietness is not None:
        say(words.claim_line(document))
    if document.proof is not None:
        for line in words.proof_lines(document.proof, arguments.verbose):
            say(line)
    return document.claim


def _is_of_these_conditions(proven: Plan, command: Sequence[str]) -> bool:
    """Whether the plan has a proof of its settings for this program on this machine."""
    from flatout import machine

    return (
        proven.proven
        and tuple(command) == proven.command
        and not proven.differences(command, machine.fingerprint())
    )
