"""Measures the speed of a plan again, in about a minute and without a proof.

First, a short run of the bare program, without any setting, shows how long a start and a step take.
Then bare and plan run in pairs of fresh processes, as for a claim (``pairs.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from flatout.plan import Evidence
from flatout.tune import bare, formatting, pairs
from flatout.tune.budget import FEW_STEPS
from flatout.tune.journal import Journal
from flatout.tune.ledger import Ledger, Options, Outcome
from flatout.tune.neighbours import Neighbours
from flatout.tune.pairs import Pace, Pairs
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire.ratios import Ratio
from flatout.wire.record import WARMUP_STEPS, ProcessRecord
from flatout.wire.request import Request

BUDGET_S = 60.0
"""The time that the whole measurement should take, in seconds. It takes longer if even runs of
``FEW_STEPS`` steps do not fit, or if the user asks for more steps."""

FIRST_RUN_S = 4.0
"""The steps of the first run may take this long, in seconds."""

FIRST_RUN_LIMIT_S = 120.0
"""The first run counts as hung after this time, in seconds."""

USUAL_STARTUP_S = 5.0
"""The start-up time of a process, in seconds, that is assumed before any start has been timed."""

MAXIMUM_STEPS = 2000
"""The maximum number of steps of a run."""

ACTIVITY = "measuring the speed again"


@dataclass(frozen=True)
class Comparison:
    """What a plan's evidence claims, and what was measured now.

    Attributes:
        claimed: the speedup that the plan's evidence claims; ``None``: the plan has no evidence.
        now: the speedup that was measured now.
        at_least: the speedup that the user asks for. ``None``: the user asks for none; then the
            claim must hold or, without a claim, there must be a gain.
        not_measurable: why other work on the machine makes the speedup impossible to measure
            (``quiet.py``), as a clause; ``None``: the speedup can be measured.
    """

    claimed: Ratio | None
    now: Ratio
    at_least: float | None = None
    not_measurable: str | None = None

    @property
    def holds(self) -> bool:
        """Whether the measurement shows that the speedup is large enough.

        With ``at_least``, the whole interval of the measured speedup must lie at or above
        ``at_least``, as in ``flatout verify --at-least``. Without it, the whole interval must lie
        above 1, and must not lie wholly below the claimed interval.
        """
        if self.not_measurable is not None:
            return False
        if self.at_least is not None:
            return self.now.low >= self.at_least
        return self.now.low > 1 and not self._is_less

    @property
    def _is_less(self) -> bool:
        return self.claimed is not None and self.now.high < self.claimed.low

    @property
    def lines(self) -> tuple[str, str]:
        """Two lines for the user: the claimed and the measured speedup, and the conclusion."""
        claimed = "nothing was claimed" if self.claimed is None else f"claimed {self.claimed}"
        if self.not_measurable is not None:
            return f"speed: {claimed}", self.not_measurable
        return f"speed: {claimed}, measured now {self.now}", self._conclusion

    @property
    def _conclusion(self) -> str:
        now = self.now
        if self.at_least is not None:
            if self.holds:
                return f"the speedup is at least {self.at_least:g}x"
            return f"the speedup of {now} is not shown to be at least {self.at_least:g}x"
        if now.high < 1:
            return "today the plan is slower than the bare program"
        if self._is_less:
            return "today the plan gains less than was claimed"
        if now.low <= 1:
            return (
                "not decided: the interval includes 1.00x (no gain); more pairs (--seeds), more "
                "steps (--steps) or a quieter machine would narrow the interval"
            )
        return "the claim holds" if self.claimed is not None else "the plan is a gain"


def claimed_by(evidence: Evidence | None) -> Ratio | None:
    """Return the speedup that a plan's evidence claims; ``None`` without evidence."""
    if evidence is None:
        return None
    return Ratio(evidence.ratio, evidence.ratio_low, evidence.ratio_high, evidence.pairs)


def choose_steps(pace: Pace, count: int, left_s: float, job_steps: int | None = None) -> int:
    """Return the number of steps of each run with which all pairs fit into the time that is left.

    If a whole cycle of the program fits (``cycles.py``), the steps after the warm-up are whole
    cycles. If not even ``FEW_STEPS`` steps fit, the pairs take longer than the time that is left.

    Args:
        pace: the pace of the bare program; the plan's is assumed to be the same.
        count: the number of pairs.
        left_s: the time that is left, in seconds.
        job_steps: the number of steps of the whole job; ``None`` if it is not known.
    """
    steps = int((left_s / (2 * count) - pace.outside_steps_s) / pace.step_s)
    steps = max(FEW_STEPS, min(steps, MAXIMUM_STEPS))
    cycles = (steps - WARMUP_STEPS) // pace.cycle_steps
    if cycles:
        steps = WARMUP_STEPS + cycles * pace.cycle_steps
    return min(steps, job_steps or steps)


def estimate_s(pace: Pace, count: int, steps: int) -> float:
    """Return the time that ``count`` pairs of runs of this many steps take, in seconds."""
    return 2 * count * pace.seconds(steps)


def estimate_before_s(evidence: Evidence | None, count: int, steps: int | None) -> float:
    """Estimate, before anything has run, how long the whole measurement takes, in seconds.

    Args:
        evidence: the evidence of the plan, with its step times; ``None``: the plan has none, and
            the result is ``BUDGET_S``.
        count: the number of pairs.
        steps: the number of steps of each run; ``None`` if ``choose_steps`` chooses it.
    """
    if evidence is None:
        return BUDGET_S
    pace = Pace(USUAL_STARTUP_S, fmean((evidence.bare_step_ms, evidence.plan_step_ms)) / 1e3)
    if steps is None:
        return max(BUDGET_S, estimate_s(pace, count, FEW_STEPS))
    return FIRST_RUN_S + USUAL_STARTUP_S + estimate_s(pace, count, steps)


def measure(
    command: Sequence[str],
    settings: Mapping[str, str],
    count: int,
    options: Options,
    journal: Journal,
    print_line: Callable[[str], None],
    refresh: Callable[[Outcome, float], None],
    warn: Callable[[str], None],
) -> Pairs:
    """Measure the speed of a plan against the bare program, in pairs of runs.

    Args:
        command: the command line of the user's program.
        settings: the settings of the plan.
        count: the number of pairs, at least 2.
        options: the options that the user gave.
        journal: the journal of this measurement.
        print_line: prints a line of progress.
        refresh, warn: see ``Tuner``.

    Returns the pairs. There are fewer than ``count`` if the user interrupts, or if the plan fails.

    Raises:
        KeyboardInterrupt: the user ends the measurement before the first pair begins.
        UserError: the program fails, never calls a model, or makes too few steps.
    """
    ledger = Ledger(BUDGET_S, lambda: journal.spent_s, print_line, refresh)
    neighbours = Neighbours(BUDGET_S, warn)
    trials = Trials(command, journal, options.isolate, ledger.notify, neighbours)
    ledger.begin("running the bare program")
    first = _run_first(trials, options)
    pace = bare.find_pace(first)
    job_steps = len(first.process.loop_steps) if first.ended else None
    steps = options.steps or choose_steps(pace, count, ledger.left_s, job_steps)
    finished = Pairs({}, dict(settings), in_relay=_can_relay(first.process, settings))
    print_line(
        f"bare: {formatting.milliseconds(pace.step_s * 1e3)} a step; {count} pairs of {steps} "
        f"steps, about {formatting.duration(estimate_s(pace, count, steps))}"
    )
    pairs.run(
        trials,
        finished,
        pace=pace,
        steps=steps,
        seed=options.seed,
        is_enough=ledger.follow_pairs(
            ACTIVITY,
            count,
            2 * pace.seconds(steps),
            lambda done: done.count >= count,
            may_exceed=False,
        ),
        print_line=print_line,
    )
    return finished


def _run_first(trials: Trials, options: Options) -> Trial:
    request = Request(
        seed=options.seed,
        stop_steps=MAXIMUM_STEPS,
        stop_seconds=FIRST_RUN_S,
        profile_steps=1,  # The profile tells whether loaders have workers.
    )
    try:
        return trials.run(request, FIRST_RUN_LIMIT_S)
    except TrialFailedError as failure:
        raise pairs.to_user_error("the program does not run", failure) from failure


def _can_relay(process: ProcessRecord, settings: Mapping[str, str]) -> bool:
    """Return whether a bare run and a run with these settings can alternate in blocks of steps (a
    relay).

    For this, nothing may go on working in the run that waits. Workers of loaders, and what some
    settings do in the background, would go on. If the program ended before it was profiled, it is
    not known whether its loaders have workers; the result is then false.
    """
    is_known = process.profile is not None and process.profile.facts is not None
    return is_known and bare.can_relay(process) and not bare.work_in_background(settings)
