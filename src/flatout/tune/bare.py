"""Runs the bare program, without any setting, and measures what later stages need to know.

The run shows how long a start and a step take, what the time of a step goes into, whether the
program trains at all, and, if the run reaches the job's end, how many steps the job has. Every
later stage of the tune gets these results as one ``BareRun``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flatout import knobs
from flatout.doctor.case import Case
from flatout.errors import UserError
from flatout.machine import Ceilings
from flatout.plan.program import Program, observe_program
from flatout.tune import budget, cycles, formatting, pairs, prediction, unwatched
from flatout.tune.budget import ProofSize
from flatout.tune.ledger import Options
from flatout.tune.pairs import Pace
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.tune.unwatched import Unwatched
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.request import Request

MAXIMUM_STEPS = 2000
"""Maximum number of steps of the first run, and therefore of a proof, unless ``Options.steps`` sets
a different number."""

FIRST_RUN_SHARE = 1 / 36
"""The first run stops timing steps when they have taken this share of the budget, but not before it
has timed ``LEAST_STEPS`` steps. A proof covers at most as many steps as the first run has timed;
``budget.size_proof`` lists the exceptions."""

LEAST_STEPS = 5
"""Number of steps that the first run times even if they are slow."""

LEAST_LIMIT_S = 120.0
"""The first run counts as hung after this many seconds, or after twice the budget if that is
longer."""

UNKNOWN_LIMIT_S = 1800.0
"""The first run counts as hung after this many seconds if the user has named no budget."""

PROFILE_STEPS = 5
"""Number of steps that the first run makes under the profiler, after the steps that are timed."""

RELAY_MEMORY_FACTOR = 3
"""Two runs exist at the same time and alternate (a relay) only if the available memory is more than
this many times the bare program's peak. The reason for the margin is that a run with settings may
need more memory than a bare run."""


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
        budget_s: the time that the tune may take, in seconds.
        proof: the size of a proof.
        job_steps: the number of steps of the whole job; ``None`` if it is not known, because the
            run was stopped before the job's end.
        can_relay: whether two runs can exist at the same time and alternate (a relay).
        unlike_s: the time of the job in steps unlike those that are compared
            (``pairs.find_unlike_s``), in seconds; 0 also if the run was stopped before the job's
            end.
        unwatched: what a run without the agent (flatout's code inside the program's process) has
            shown; ``None`` if there was no such run, or if it tells nothing.
    """

    process: ProcessRecord
    modules: frozenset[str]
    program: Program
    pace: Pace
    phases_ms: Mapping[str, float | None]
    budget_s: float
    proof: ProofSize
    job_steps: int | None
    can_relay: bool
    unlike_s: float = 0.0
    unwatched: Unwatched | None = None

    def can_relay_under(self, settings: Mapping[str, str]) -> bool:
        """Return whether a bare run and a run with these settings can alternate in a relay."""
        return self.can_relay and not work_in_background(settings)


def work_in_background(settings: Mapping[str, str]) -> bool:
    """Return whether any of these settings starts processes that keep working while its run waits
    in a relay."""
    return any(setting in knobs.get(name).background_settings for name, setting in settings.items())


def run(
    command: Sequence[str], options: Options, trials: Trials, print_line: Callable[[str], None]
) -> BareRun:
    """Run the bare program until it is stopped (``FIRST_RUN_SHARE``) or ends.

    Args:
        command: the command line of the user's program.
        options: the options that the user gave.
        trials: the runner of trials.
        print_line: prints a line of progress.

    Raises:
        UserError: the program fails, never calls a model, or has fewer steps than the user wants.
    """
    print_line("running the bare program to see how long its steps take")
    first = _run_first(options, trials)
    pace = find_pace(first)
    timed = _find_timed_steps(first, options)
    process = first.process
    if first.ended and not _is_profiled(process):
        print_line("the program ended before its steps were profiled, so it runs again")
        process = _profile_early(options, trials, process)
    step_s = pace.step_s
    of_cycles = ""
    if pace.micro_batches > 1:
        of_cycles = f", each a micro-batch, {pace.micro_batches} to an optimizer step"
    if pace.cycle_steps > pace.micro_batches:
        of_cycles += f", with {pace.cycle_steps} steps between groups of evaluation passes"
    print_line(
        f"bare: {formatting.milliseconds(step_s * 1e3)} a step ({len(timed)} steps{of_cycles}), "
        f"{pairs.startup_s(process):.1f} s of start-up"
    )
    budget_s = options.budget_seconds
    if budget_s is None:
        budget_s = budget.choose_budget_s(pace)
        print_line(
            f"the tune takes about {formatting.duration(budget_s)}, given how long a step and a "
            "start take; Ctrl-C ends the tune and keeps what is proven"
        )
    job_steps = len(process.loop_steps) if first.ended else None
    phases_ms = pairs.phases_ms([process], step_s * 1e3)
    if process.replayed is not None:
        replayed = prediction.with_optimizer_ms(process.replayed, phases_ms.get("optimizer"))
        process = dataclasses.replace(process, replayed=replayed)
    is_relay_possible = can_relay(process) and job_steps != 1
    if not is_relay_possible:
        pace.overlap_s = 0.0
    return BareRun(
        process=process,
        modules=first.modules,
        program=observe_program(command, first.modules),
        pace=pace,
        phases_ms=phases_ms,
        budget_s=budget_s,
        proof=budget.size_proof(
            pace,
            budget_s,
            seen_steps=len(timed),
            wanted_steps=options.steps,
            job_steps=job_steps,
            may_share_gradients=is_relay_possible and process.trains,
        ),
        job_steps=job_steps,
        unlike_s=pairs.find_unlike_s(process) if first.ended else 0.0,
        can_relay=is_relay_possible,
    )


def find_pace(first: Trial) -> Pace:
    """Return the pace of the bare program, given its first run.

    Raises:
        UserError: the run made no step.
    """
    process = first.process
    if not process.loop_steps:
        raise UserError("this program never calls a model or backward: there is no step")
    outside_steps_s = find_outside_steps_s(first)
    # When two runs alternate, the second run waits after ``import torch`` until the first run has
    # warmed up. So the two runs overlap only in what precedes this import and in what follows
    # the steps.
    overlap_s = max(outside_steps_s - pairs.startup_s(process), 0.0)
    return Pace(
        outside_steps_s,
        pairs.step_ms(process) / 1e3,
        cycle_steps=cycles.find_cycle_steps(process),
        micro_batches=process.micro_batches,
        overlap_s=overlap_s if can_relay(process) else 0.0,
    )


def find_outside_steps_s(trial: Trial) -> float:
    """Return the time that a trial took outside of its steps, in seconds. The time of the profile
    and of replayed calls does not count."""
    process = trial.process
    first_s = process.loop_steps[0].at_s
    if process.end is not None and process.end.reason == "stopped":
        # Between the first step and the stop, everything except the steps is the agent's work.
        return max(trial.seconds - (process.end.at_s - first_s), 0.0)
    replay_s = 0.0 if process.replayed is None else process.replayed.seconds
    return max(trial.seconds - process.in_steps_s - replay_s, 0.0)


def _run_first(options: Options, trials: Trials) -> Trial:
    limit_s = (options.budget_seconds or budget.UNKNOWN_BUDGET_S) * FIRST_RUN_SHARE
    request = Request(
        seed=options.seed,
        stop_steps=options.steps or MAXIMUM_STEPS,
        stop_seconds=None if options.steps else limit_s,
        least_steps=LEAST_STEPS,
        profile_steps=PROFILE_STEPS,
        replay=prediction.make_request(options),
    )
    try:
        return trials.run(request, _limit_s(options))
    except TrialFailedError as failure:
        raise pairs.to_user_error("the program does not run", failure) from failure


def _is_profiled(process: ProcessRecord) -> bool:
    return process.profile is not None and bool(process.profile.operators)


def _profile_early(options: Options, trials: Trials, process: ProcessRecord) -> ProcessRecord:
    """Run the program again, because the first run ended before its steps were profiled.

    The second run profiles up to ``PROFILE_STEPS`` steps, from the middle of the program on. If
    that gives no profile, a third run profiles steps from the program's second step on. Without a
    profile, the tune would try settings that do not affect this program.

    Returns the record of the first run, with the profile and the replayed calls (``prediction.py``)
    of the later run. If no run gives a profile, the record is returned unchanged.

    Raises:
        UserError: the program fails.
    """
    length = len(process.loop_steps)
    # The number of timed steps before the profiled steps:
    for timed in dict.fromkeys((length // 2, 1)):
        # Counting the FLOPs takes one more step, and so does recording the calls to be replayed.
        steps = min(PROFILE_STEPS, length - timed - 2)
        request = Request(
            seed=options.seed,
            stop_steps=timed,
            profile_steps=max(steps, 1),
            replay=prediction.make_request(options),
        )
        try:
            again = trials.run(request, _limit_s(options)).process
        except TrialFailedError as failure:
            raise pairs.to_user_error("the program fails when it runs again", failure) from failure
        if _is_profiled(again):
            return dataclasses.replace(process, profile=again.profile, replayed=again.replayed)
    return process


def _limit_s(options: Options) -> float:
    """Return the time after which a run counts as hung before the program's pace is known."""
    if options.budget_seconds is None:
        return UNKNOWN_LIMIT_S
    return max(2 * options.budget_seconds, LEAST_LIMIT_S)


def _find_timed_steps(first: Trial, options: Options) -> list[Step]:
    """Return the steps before the profiled ones.

    Raises:
        UserError: the program has fewer steps than the user wants.
    """
    steps = first.process.loop_steps
    if first.ended and len(steps) < (options.steps or 0):
        raise UserError(
            f"this program ends after {len(steps)} steps, so its proof cannot cover the "
            f"{options.steps} steps that --steps asks for"
        )
    return first.process.timed_steps


def can_relay(process: ProcessRecord) -> bool:
    """Return whether two copies of this program can exist at the same time, as a relay needs.

    The result is false for distributed jobs (both copies would use the same port), for programs
    whose loaders have workers (which would keep working while their run waits), on accelerators (it
    is not known how much of their memory is free), and if too little main memory is available
    (``RELAY_MEMORY_FACTOR``).
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


def compare_unwatched(
    first: BareRun,
    trials: Trials,
    ceilings: Ceilings | None,
    print_line: Callable[[str], None],
) -> BareRun:
    """Run the bare program without the agent, and compare its page faults with the first run's.

    No such run is made if the cost of a page fault is not known, if the run would take too much of
    the budget (``unwatched.BUDGET_SHARE``), or if the program would end before the page faults have
    been counted.

    Returns the first run, with ``unwatched`` filled in if page faults were counted.

    Raises:
        KeyboardInterrupt: the user ends the tune.
    """
    step_s = first.pace.step_s
    window_s = max(unwatched.WINDOW_S, unwatched.WINDOW_STEPS * step_s)
    from_s = first.pace.outside_steps_s + unwatched.WARMUP_STEPS * step_s
    job_s = math.inf if first.job_steps is None else first.pace.seconds(first.job_steps)
    case = Case(first.process, ceilings)
    if case.page_fault_us is None or from_s + window_s > min(
        job_s, unwatched.BUDGET_SHARE * first.budget_s
    ):
        return first
    rate = unwatched.faults_per_s(trials.sample_unwatched(from_s + window_s), from_s)
    if rate is None:
        return first
    found = Unwatched(rate, case.page_fault_us * case.main_thread_faults)
    difference = unwatched.describe(found.factor(first.process))
    if difference is not None:
        print_line(difference)
    return dataclasses.replace(first, unwatched=found)
