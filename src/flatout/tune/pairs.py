"""Bare and a plan in fresh processes, in alternation: the claim, and the losses for the proof.

Bare, plan, plan, bare, ...: the order is mirrored from pair to pair, so that a steady drift of the
machine cancels; both runs of a pair have the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, geometric_mean, median
from typing import Any

from flatout import knobs
from flatout.errors import UserError
from flatout.tune import figures, statistics, trial
from flatout.tune.trial import RelayFailedError, Trial, TrialFailedError, Trials
from flatout.wire.ratios import Ratio
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.request import Envelope, Inspection, Relay, Request
from flatout.wire.turns import PHASES

WARMUP_STEPS = 3
"""Steps left out at the beginning of each run: first calls, lazy initialisation."""

MINIMUM_STEPS = 20
"""Steps of a run below which neither its mean nor a loss says much."""

LIMIT_FACTOR, LIMIT_EXTRA_S = 4.0, 30.0
"""A trial may take so many times what bare needs, and so much more, before it counts as hung."""


@dataclass
class Pace:
    """How long bare takes.

    Attributes:
        startup_s: of a process, until its first step.
        step_s: one step.
    """

    startup_s: float
    step_s: float

    def limit_s(self, steps: int) -> float:
        """Time limit for a trial of so many steps."""
        return LIMIT_EXTRA_S + LIMIT_FACTOR * self.seconds(steps)

    def seconds(self, steps: int) -> float:
        """Of a trial of so many steps, about."""
        return self.startup_s + steps * self.step_s


@dataclass
class Pairs:
    """Pairs that have ended.

    Attributes:
        first, second: the settings of the two sides.
        firsts, seconds: their trials, one of each for each pair.
        in_relay: whether both sides of a pair run at the same time, in turns of some steps.
        failure: why the second side cannot run, ``None`` if it can.
        interrupted: whether the user has ended it early.
        overtime_from: how many there were when the budget was spent, if more were wanted.
    """

    first: Mapping[str, str]
    second: Mapping[str, str]
    firsts: list[Trial] = field(default_factory=list)
    seconds: list[Trial] = field(default_factory=list)
    in_relay: bool = False
    failure: str | None = None
    interrupted: bool = False
    overtime_from: int | None = None

    @property
    def count(self) -> int:
        """How many pairs are complete."""
        return min(len(self.firsts), len(self.seconds))

    @property
    def times_ms(self) -> list[tuple[float, float]]:
        """The step times of each pair, see ``paired_ms``."""
        return [
            paired_ms(one.process, other.process)
            for one, other in zip(self.firsts, self.seconds, strict=False)
        ]

    @property
    def log_ratios(self) -> list[float]:
        """Of the step times of each pair."""
        return [math.log(one / other) for one, other in self.times_ms]

    @property
    def ratio(self) -> Ratio:
        """How many times faster the second side is.

        Raises:
            ValueError: there are fewer than two pairs.
        """
        return statistics.claimed(self.log_ratios)

    @property
    def whole_ratio(self) -> float:
        """``ratio`` with all steps, those among them that ``paired_ms`` leaves out: if it is the
        plan that makes them slow, and no accident, they show here."""
        both = zip(self.firsts, self.seconds, strict=False)
        return geometric_mean(step_ms(one.process) / step_ms(other.process) for one, other in both)

    @property
    def costs(self) -> tuple[Cost, Cost]:
        """What the two sides take; their step times are in the ratio that is claimed."""
        times_ms = self.times_ms
        firsts, seconds = (
            cost(side[: self.count], geometric_mean(column))
            for side, column in zip(
                (self.firsts, self.seconds), zip(*times_ms, strict=True), strict=True
            )
        )
        return firsts, seconds

    def steps(self, side: list[Trial]) -> list[list[Step]]:
        """The steps of each run of a side that is part of a complete pair."""
        return [done.process.turns for done in side[: self.count]]


def paired_ms(one: ProcessRecord, other: ProcessRecord) -> tuple[float, float]:
    """Step times of two runs with the same seed: whatever is said of a pair is made of these.

    See ``statistics.paired_means_ms``; evaluation passes between the steps are added to both.
    """
    in_steps = statistics.paired_means_ms(
        statistics.timed_ms(one.turns, WARMUP_STEPS), statistics.timed_ms(other.turns, WARMUP_STEPS)
    )
    first, second = (
        mean * step_ms(process) / fmean(turn.step_ms for turn in timed_turns(process))
        for mean, process in zip(in_steps, (one, other), strict=True)
    )
    return first, second


def step_ms(process: ProcessRecord) -> float:
    """Mean time of a step after the warm-up, with its share of the evaluation passes.

    A median would be calmer, but it leaves out those passes, and whatever happens at every tenth
    step only: the user waits for all of it.
    """
    timed = timed_turns(process)
    if not timed:
        raise ValueError(f"{len(process.turns)} steps leave none after a warm-up of {WARMUP_STEPS}")
    between = _passes_between(process, timed)
    return sum(turn.step_ms for turn in (*timed, *between)) / len(timed)


def timed_turns(process: ProcessRecord) -> list[Step]:
    """The steps that tell the usual time: after the warm-up, neither profiled nor after a wait."""
    return [turn for turn in process.turns[WARMUP_STEPS:] if turn.mark is None]


def _passes_between(process: ProcessRecord, timed: Sequence[Step]) -> list[Step]:
    """Evaluation passes between the first and the last timed step."""
    passes = process.evaluations if process.trains else []
    first_s, last_s = timed[0].at_s, timed[-1].at_s
    return [p for p in passes if p.mark is None and first_s <= p.at_s <= last_s]


@dataclass(frozen=True)
class Cost:
    """What one side takes: medians over its runs, of the step their geometric mean.

    Attributes:
        startup_s: from the import of torch to the first step.
        warmup_s: what the first steps take more than later ones: compilation, first calls.
        step_ms: one step after that.
    """

    startup_s: float
    warmup_s: float
    step_ms: float

    def job_s(self, steps: int) -> float:
        """The projected time of a job of so many steps."""
        return self.startup_s + self.warmup_s + steps * self.step_ms / 1e3


def cost(trials: Sequence[Trial], of_step_ms: float) -> Cost:
    """What these runs of one side take.

    Args:
        trials: the runs, at least one.
        of_step_ms: their step time, see ``Pairs.costs``.
    """
    startups, warmups = [], []
    for done in trials:
        turns = done.process.turns
        first_s = sum(turn.step_ms for turn in turns[:WARMUP_STEPS]) / 1e3
        usual_s = WARMUP_STEPS * step_ms(done.process) / 1e3
        startups.append(turns[0].at_s)
        warmups.append(max(first_s - usual_s, 0.0))
    return Cost(median(startups), median(warmups), of_step_ms)


def phases_ms(processes: Sequence[ProcessRecord], of_step_ms: float) -> dict[str, float | None]:
    """The parts of a step (``document.PARTS``), which sum to it; ``None``: not measured.

    Args:
        processes: runs of one side, at least one.
        of_step_ms: their step time, of which these are the mean shares over the runs.
    """
    shares: dict[str, list[float]] = {}
    for process in processes:
        timed = timed_turns(process)
        whole_ms = step_ms(process) * len(timed)
        for phase in PHASES:
            known = [ms for turn in timed if (ms := turn.phases_ms[phase]) is not None]
            if known:
                shares.setdefault(phase, []).append(sum(known) / whole_ms)
        between = _passes_between(process, timed)
        if between:
            part = sum(turn.step_ms for turn in between) / whole_ms
            shares.setdefault("evaluation", []).append(part)
    found: dict[str, float | None] = dict.fromkeys(PHASES)
    for name, of_runs in shares.items():
        found[name] = of_step_ms * sum(of_runs) / len(processes)
    return found


def break_even_steps(bare: Cost, plan: Cost, tune_s: float) -> int | None:
    """Steps after which the plan has made up for the tune and its longer start; ``None``: never.

    Args:
        bare, plan: what the two sides take.
        tune_s: what the tune took.
    """
    gain_s = (bare.step_ms - plan.step_ms) / 1e3
    longer_s = tune_s + plan.startup_s + plan.warmup_s - bare.startup_s - bare.warmup_s
    if gain_s <= 0:
        return None
    return max(0, math.ceil(longer_s / gain_s))


def run(
    trials: Trials,
    pairs: Pairs,
    *,
    pace: Pace,
    steps: int,
    seed: int,
    is_enough: Callable[[Pairs], bool],
    say: Callable[[str], None],
) -> None:
    """Run pairs until there are enough, and add them to ``pairs``.

    Args:
        trials: of this tune.
        pairs: to be added to.
        pace: of bare.
        steps: of each run.
        seed: of the first pair; the others count up from it.
        is_enough: asked before each pair.
        say: called with a line for each pair.

    Raises:
        UserError: the first side cannot run.
    """
    while not is_enough(pairs):
        number = pairs.count
        try:
            if pairs.in_relay:
                _relay(trials, pairs, pace=pace, steps=steps, seed=seed + number)
            else:
                for is_second in (False, True) if number % 2 == 0 else (True, False):
                    if pairs.failure is None:
                        _one(trials, pairs, is_second, pace=pace, steps=steps, seed=seed + number)
        except KeyboardInterrupt:
            pairs.interrupted = True
            del pairs.firsts[number:], pairs.seconds[number:]
            return
        except RelayFailedError as failed:
            if failed.place == 1 and number:
                pairs.failure = str(failed)
            elif number:
                raise said("the program fails when it runs again", failed.failure) from failed
            else:
                say(f"two runs at the same time fail ({failed}): one after the other from now on")
                pairs.in_relay = False
                continue
        if pairs.failure is not None:
            return
        one, other = pairs.times_ms[-1]
        say(
            f"pair {number + 1}: {figures.milliseconds(one)}, {figures.milliseconds(other)}, "
            f"{one / other:.2f}x"
        )


TURN_STEPS, TURN_S, FEWEST_TURNS = 5, 0.1, 8
"""Of a turn, at least as many steps and about as long, if that leaves a run so many of them: the
first fifth is left out, the rest must outlast what has gone cold while the other one ran."""


def turns(steps: int, step_s: float) -> Relay:
    """How two runs of so many steps take turns; the first steps, which fill no turn, warm up."""
    usable = steps - WARMUP_STEPS
    block_steps = max(TURN_STEPS, min(round(TURN_S / step_s), usable // FEWEST_TURNS))
    blocks = max(usable // block_steps, 1)
    return Relay(
        folder="",
        place=0,
        block_steps=block_steps,
        discard_steps=block_steps // TURN_STEPS,
        warmup_steps=steps - blocks * block_steps,
        blocks=blocks,
    )


def _relay(trials: Trials, pairs: Pairs, *, pace: Pace, steps: int, seed: int) -> None:
    """One pair of runs that take turns.

    Raises:
        RelayFailedError: one of them fails, or one of the knobs.
    """
    relay = turns(steps, pace.step_s)
    sides = (pairs.first, pairs.second) if pairs.count % 2 == 0 else (pairs.second, pairs.first)
    one, other = (_request(s, seed=seed, inspection=PROOF) for s in sides)
    try:
        done = trials.run_two((one, other), relay, 2 * pace.limit_s(steps))
        for place, settings in enumerate(sides):
            try:
                _check(done[place], settings, steps, seed)
            except TrialFailedError as failure:
                raise RelayFailedError(place, failure) from failure
    except RelayFailedError as failed:
        if pairs.count % 2:
            raise RelayFailedError(1 - failed.place, failed.failure) from failed
        raise
    first, second = done if pairs.count % 2 == 0 else done[::-1]
    pairs.firsts.append(first)
    pairs.seconds.append(second)


PROOF = Inspection(state=True, outputs=8)
"""What a proof wants to see of a run, besides its losses."""


def one_run(
    trials: Trials,
    settings: Mapping[str, str],
    *,
    pace: Pace,
    steps: int,
    seed: int,
    inspection: Inspection = PROOF,
) -> Trial:
    """One run under some settings.

    Raises:
        TrialFailedError: it fails, one of the knobs does, or it ends early.
    """
    request = _request(settings, seed=seed, inspection=inspection, stop_steps=steps)
    done = trials.run(request, pace.limit_s(steps))
    _check(done, settings, steps, seed)
    return done


def _request(settings: Mapping[str, str], **asked: Any) -> Request:
    """What a run under some settings is asked for: with the guard, whose time belongs to them."""
    is_bitwise = all(knobs.is_bitwise(name, setting) for name, setting in settings.items())
    guard = None if is_bitwise else Envelope()
    return Request(settings=dict(settings), guard=guard, **asked)


def _check(done: Trial, settings: Mapping[str, str], steps: int, seed: int) -> None:
    """Check that a run came as far as it should, with all its knobs.

    Raises:
        TrialFailedError: it did not.
    """
    for name, why in trial.reasons(done.process, "failed").items():
        if name in settings:
            raise TrialFailedError(f"{name}: {why}", done.process, "")
    if len(done.process.turns) < min(MINIMUM_STEPS, steps):
        raise TrialFailedError(
            f"with seed {seed} this program ends after {len(done.process.turns)} steps, tune "
            f"needs at least {MINIMUM_STEPS}",
            done.process,
            "",
        )


def _one(
    trials: Trials, pairs: Pairs, is_second: bool, *, pace: Pace, steps: int, seed: int
) -> None:
    settings = pairs.second if is_second else pairs.first
    side = pairs.seconds if is_second else pairs.firsts
    try:
        side.append(one_run(trials, settings, pace=pace, steps=steps, seed=seed))
    except TrialFailedError as failure:
        if not is_second:
            raise said("the program fails when it runs again", failure) from failure
        pairs.failure = str(failure)


def said(message: str, failure: TrialFailedError) -> UserError:
    """A user error that ends with the program's last lines."""
    lines = f"; its last lines:\n{failure.tail}" if failure.tail else ""
    return UserError(f"{message}: {failure}{lines}")
