"""Runs the bare program, without any setting, and measures what later stages need to know.

The run shows how long a start and a step take, what the time of a step goes into, whether the
program trains at all, and how many steps it has. Every later stage gets this as one ``BareRun``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flatout import knobs
from flatout.doctor.case import Case
from flatout.errors import UserError
from flatout.plan.program import Program, observe_program
from flatout.tune import formatting, pairs
from flatout.tune.ledger import Options
from flatout.tune.pairs import MINIMUM_STEPS, Pace
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire.profile import Profile
from flatout.wire.record import WARMUP_STEPS, ProcessRecord, Step
from flatout.wire.request import Request

USUAL_STEPS = 200
"""Number of steps that a proof covers, unless the steps are fast (``USUAL_S``) or ``Options.steps``
gives another number."""

USUAL_S = 2.0
"""If ``USUAL_STEPS`` steps take less than this many seconds, a proof covers as many steps as fit
into that time."""

MAXIMUM_STEPS = 2000
"""Maximum number of steps of the first run, and therefore of a proof, unless ``Options.steps``
gives another number."""

FIRST_RUN_SHARE = 1 / 36
"""Share of the budget that the steps of the first run may take. A proof covers no more steps than
the first run has timed, but at least ``pairs.MINIMUM_STEPS``."""

LEAST_LIMIT_S = 120.0
"""The first run counts as hung after this many seconds, or after twice the budget if that is
longer."""

PROFILE_STEPS = 5
"""Number of steps that the first run makes under the profiler, after the steps that are timed."""

RELAY_MEMORY_FACTOR = 3
"""Two runs exist at the same time only if the available memory is at least this many times the bare
program's peak, because a run with settings may need more than a bare one."""


@dataclass(frozen=True)
class BareRun:
    """What the first run has shown.

    Attributes:
        process: the record of the job's main process.
        modules: the files that the run has imported.
        program: the files of which the program consists, and the environment variables that they
            name.
        pace: the time that a run and a step take.
        phases_ms: the time of each phase of a step; ``None`` if it was not measured.
        proof_steps: the number of steps of each run of a proof.
        job_steps: the number of steps of the whole job; ``None`` if it is not known, because the
            run was stopped before the job's end.
        can_relay: whether two runs can stay alive at the same time and alternate (a relay).
    """

    process: ProcessRecord
    modules: frozenset[str]
    program: Program
    pace: Pace
    phases_ms: Mapping[str, float | None]
    proof_steps: int
    job_steps: int | None
    can_relay: bool

    def can_relay_under(self, settings: Mapping[str, str]) -> bool:
        """Return whether a bare run and a run with these settings can alternate in a relay."""
        return self.can_relay and not any(
            setting in knobs.get(name).background_settings for name, setting in settings.items()
        )


def run(
    command: Sequence[str], options: Options, trials: Trials, print_line: Callable[[str], None]
) -> BareRun:
    """Run the bare program for as long as its share of the budget allows.

    Args:
        command: the command line of the user's program.
        options: the options that the user gave.
        trials: the runner of trials.
        print_line: prints a line of progress.

    Raises:
        UserError: the program fails, never calls a model, or makes too few steps.
    """
    print_line("running the bare program to see what its steps take")
    limit_s = options.budget_seconds * FIRST_RUN_SHARE
    first = _run_first(options, trials, limit_s)
    timed = _find_timed_steps(first, options, limit_s)
    process = first.process
    if first.ended and (process.profile is None or not process.profile.operators):
        print_line("it ends before its steps were profiled, so it runs again")
        profile = _profile_early(options, trials, process) or process.profile
        process = dataclasses.replace(process, profile=profile)
    step_s = pairs.step_ms(process) / 1e3
    in_steps_s = sum(step.step_ms for step in process.loop_steps) / 1e3
    longest = max(USUAL_STEPS, int(USUAL_S / step_s))
    print_line(
        f"bare: {formatting.milliseconds(step_s * 1e3)} a step ({len(timed)} steps), "
        f"{pairs.startup_s(process):.1f} s of start-up"
    )
    return BareRun(
        process=process,
        modules=first.modules,
        program=observe_program(command, first.modules),
        pace=Pace(max(first.seconds - in_steps_s, 0), step_s),
        phases_ms=pairs.phases_ms([process], step_s * 1e3),
        proof_steps=options.steps or max(min(len(timed), longest), MINIMUM_STEPS),
        job_steps=len(process.loop_steps) if first.ended else None,
        can_relay=_can_relay(process),
    )


def _run_first(options: Options, trials: Trials, limit_s: float) -> Trial:
    request = Request(
        seed=options.seed,
        stop_steps=options.steps or MAXIMUM_STEPS,
        stop_seconds=None if options.steps else limit_s,
        profile_steps=PROFILE_STEPS,
    )
    try:
        return trials.run(request, max(2 * options.budget_seconds, LEAST_LIMIT_S))
    except TrialFailedError as failure:
        raise pairs.to_user_error("the program does not run", failure) from failure


def _profile_early(options: Options, trials: Trials, process: ProcessRecord) -> Profile | None:
    """Run a program again of which the first run has reached the end, and profile its second half:
    without a profile, settings would be tried that concern nothing in this program.

    Raises:
        UserError: the program fails.
    """
    request = Request(
        seed=options.seed,
        stop_steps=len(process.loop_steps) // 2,  # page faults are measured in many steps
        profile_steps=PROFILE_STEPS,
    )
    try:
        return trials.run(request, max(2 * options.budget_seconds, LEAST_LIMIT_S)).process.profile
    except TrialFailedError as failure:
        raise pairs.to_user_error("the program fails when it runs again", failure) from failure


def _find_timed_steps(first: Trial, options: Options, limit_s: float) -> list[Step]:
    """Return the steps before the profiled ones.

    Raises:
        UserError: there are too few of them.
    """
    steps = first.process.loop_steps
    if not steps:
        raise UserError("this program never calls a model or backward: there is no step")
    needed = max(MINIMUM_STEPS, options.steps or 0)
    if first.ended and len(steps) < needed:
        raise UserError(
            f"this program ends after {len(steps)} steps, and its proof needs at least {needed}"
        )
    timed = first.process.timed_steps
    if len(timed) <= WARMUP_STEPS:
        raise UserError(
            f"the budget is too short: only {formatting.count(len(timed), 'step')} fit into the "
            f"{limit_s:.1f} s of the first run, and {WARMUP_STEPS + 1} are needed; "
            "give tune a longer --budget, or --steps"
        )
    return timed


def _can_relay(process: ProcessRecord) -> bool:
    """Return whether two copies of this program can stay alive at the same time, as a relay needs.

    The result is false for distributed jobs, because both copies would use the same port; for
    loaders with workers, because the workers keep running while their run waits; on accelerators,
    because it is not known how much of their memory is free; and if there is too little free main
    memory.
    """
    import psutil

    case = Case(process)
    if any(loader.workers for loader in case.facts.loaders or ()):
        return False
    peaks = [step.peak_rss_bytes or 0 for step in process.timed_steps]
    available_bytes = psutil.virtual_memory().available
    return (
        process.header.world_size is None
        and not case.on_accelerator
        and RELAY_MEMORY_FACTOR * max(peaks, default=0) < available_bytes
    )
