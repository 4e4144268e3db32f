"""Runs a baseline and a variant of the program in pairs of fresh processes.

The pairs give the claimed ratio, and the losses for the proof. Baseline and variant differ in their
settings. The baseline usually has none: it is the *bare* program.

The two runs of a pair have the same seed. If two copies of the program can be alive at once
(``bare.BareRun.can_relay_under``), the two runs form a *relay*: they alternate in *blocks* of
steps, so that one run waits while the other makes a block. Otherwise the runs follow one another,
in the order baseline, variant, variant, baseline, and so on, so that a steady drift of the
machine's speed cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, geometric_mean, median
from typing import Any

from flatout import knobs
from flatout.errors import UserError
from flatout.tune import formatting, quiet, statistics, trial
from flatout.tune.quiet import Quietness
from flatout.tune.trial import RelayFailedError, Trial, TrialFailedError, Trials
from flatout.tune.unwatched import Unwatched
from flatout.wire.ratios import Ratio
from flatout.wire.record import WARMUP_STEPS, ProcessRecord, Step
from flatout.wire.request import GuardRequest, Inspection, Relay, Request
from flatout.wire.turns import PHASES

MINIMUM_STEPS = 20
"""Minimum number of steps of a run whose times or losses are compared. A run has fewer if the
program ends earlier, or if steps are so slow that the budget has no time for this many."""

LIMIT_FACTOR = 4.0
"""A trial (a single run) counts as hung if it takes longer than ``LIMIT_EXTRA_S`` plus this many
times the time that the bare program needs for as many steps."""

LIMIT_EXTRA_S = 30.0
"""Time that is added to the limit of every trial, in seconds; see ``LIMIT_FACTOR``."""

PROOF_INSPECTION = Inspection(state=True, outputs=8)
"""What each run of a proof records, besides its losses."""

RELAY_BLOCK_STEPS = 5
"""Minimum number of steps in a block of a relay, unless each step takes ``RELAY_SLOW_STEP_S`` or
longer."""

RELAY_SLOW_STEP_S = 0.25
"""If a step takes at least this many seconds, the runs of a relay alternate at each step. Such a
step is long enough to refill the caches."""

RELAY_BLOCK_S = 0.1
"""Minimum duration of a block of a relay, in seconds, unless each run would then have fewer than
``FEWEST_RELAY_BLOCKS`` blocks. A block must be long enough to refill the caches, which hold the
other run's data when the block begins."""

FEWEST_RELAY_BLOCKS = 8
"""Minimum number of blocks of each run of a relay, unless the run is too short for them."""

RELAY_DISCARD_SHARE = 1 / 5
"""Share of a block's steps that is not timed, at the start of the block."""


UNLIKE_FACTOR = 20.0
UNLIKE_SHARE = 0.05
"""See ``find_unlike_s``."""


@dataclass
class Pace:
    """The times from which the duration of a trial is estimated.

    Attributes:
        outside_steps_s: the wall time of the bare run outside its steps, in seconds: what comes
            before the first step, such as the start of Python and the imports, and after the last.
        step_s: the time of a step of the bare program, in seconds.
        cycle_steps: the number of steps after which something recurs in the program, such as
            evaluation passes (a cycle, see ``cycles.py``); 1 if there is no cycle.
        micro_batches: the number of steps from one optimizer step to the next.
        overlap_s: the time that the two runs of a relay save, in seconds, because both start Python
            at the same time and both end at the same time; 0 if runs cannot alternate.
        extra_s: how much longer the last pair took, because of its settings, than the attributes
            above predict, in seconds. It is set to 0 before pairs of other settings begin.
    """

    outside_steps_s: float
    step_s: float
    cycle_steps: int = 1
    micro_batches: int = 1
    overlap_s: float = 0.0
    extra_s: float = 0.0

    def limit_s(self, steps: int) -> float:
        """Return the time limit of a trial of this many steps, in seconds."""
        return LIMIT_EXTRA_S + LIMIT_FACTOR * self.seconds(steps)

    def seconds(self, steps: int) -> float:
        """Return the expected time of a trial of this many steps, in seconds."""
        return self.outside_steps_s + steps * self.step_s

    def pair_s(self, steps: int) -> float:
        """Return the expected time of a pair of trials of this many steps, in seconds."""
        return 2 * self.seconds(steps) - self.overlap_s + self.extra_s

    def learn_pair(self, steps: int, pair_s: float) -> None:
        """Learn ``extra_s`` from the time that a pair of trials of this many steps has taken, in
        seconds."""
        self.extra_s = max(self.extra_s + pair_s - self.pair_s(steps), 0.0)

    def learn(self, outside_steps_s: float) -> None:
        """Learn from a later run, if it took less time outside its steps than the runs before.

        The first run takes longer, because it finds fewer of the program's files in memory.
        """
        shorter_s = max(self.outside_steps_s - outside_steps_s, 0.0)
        self.outside_steps_s -= shorter_s
        self.overlap_s = max(self.overlap_s - shorter_s, 0.0)


@dataclass
class Pairs:
    """Finished runs of a baseline and a variant, in pairs.

    Attributes:
        baseline, variant: the settings of the two sides.
        baseline_runs, variant_runs: the trials of the two sides, one of each for each pair.
        in_relay: whether both runs of a pair exist at the same time and alternate in blocks of
            steps.
        failure: the reason why the variant cannot run; ``None`` if it can.
        interrupted: whether the user has ended the tune early.
        unwatched: what a bare run without the agent (flatout's code inside the program) has shown;
            ``None``: the baseline's times are not corrected.
        began_in_relay: the initial value of ``in_relay``. If the first relay fails, ``in_relay``
            becomes false.
    """

    baseline: Mapping[str, str]
    variant: Mapping[str, str]
    baseline_runs: list[Trial] = field(default_factory=list)
    variant_runs: list[Trial] = field(default_factory=list)
    in_relay: bool = False
    failure: str | None = None
    interrupted: bool = False
    unwatched: Unwatched | None = None
    began_in_relay: bool = field(init=False)
    _blocks: list[list[quiet.Block]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.began_in_relay = self.in_relay

    @property
    def count(self) -> int:
        """The number of complete pairs."""
        return min(len(self.baseline_runs), len(self.variant_runs))

    @property
    def blocks(self) -> list[list[quiet.Block]]:
        """The blocks of each pair (``quiet.Block``)."""
        for number in range(len(self._blocks), self.count):
            both = self.baseline_runs[number].process, self.variant_runs[number].process
            self._blocks.append(quiet.find_blocks(*both, in_relay=self.in_relay))
        return self._blocks[: self.count]

    @property
    def quietness(self) -> Quietness:
        """How much other processes have disturbed these pairs, and whether a speedup can be
        claimed."""
        return quiet.assess(self.blocks, self.needs_quiet)

    @property
    def counted_count(self) -> int:
        """The number of pairs that count, because other processes hardly disturbed them
        (``quiet.py``)."""
        return len(quiet.counted_pairs(self.blocks, self.needs_quiet))

    @property
    def needs_quiet(self) -> bool:
        """Whether the ratio can be measured only on CPUs that other processes leave alone."""
        return quiet.needs_quiet(self.baseline, self.variant)

    @property
    def times_ms(self) -> list[tuple[float, float]]:
        """The step times of the two runs of each pair that counts, in ms.

        Each time is the mean that ``statistics.paired_means_ms`` returns, plus the time per step
        of the evaluation passes and of late captures (``late_captures_ms``). Only blocks that count
        are used (``quiet.py``). If so few pairs count that nothing can be claimed, all blocks of
        all pairs are used. In both cases, the baseline's times are multiplied by
        ``unwatched.Unwatched.factor`` if ``unwatched`` is known.
        """
        counted = [
            (one.process, other.process, blocks)
            for (one, other), blocks in zip(self._zipped, self._counted_blocks, strict=True)
            if blocks
        ]
        in_steps = statistics.paired_means_ms(
            [
                [
                    (step.step_ms, counterpart.step_ms) if number in counting else None
                    for number, (step, counterpart) in enumerate(
                        zip(one.steady_steps, other.steady_steps, strict=False)
                    )
                ]
                for one, other, blocks in counted
                for counting in [{n for block in blocks for n in range(*block.positions)}]
            ]
        )
        between = [
            [
                _passes_ms(process.steady_steps, blocks, side) + late_captures_ms(process)
                for side, process in enumerate((one, other))
            ]
            for one, other, blocks in counted
        ]
        return [
            (self._factor(one) * (first + extra[0]), second + extra[1])
            for (first, second), extra, (one, _, _) in zip(in_steps, between, counted, strict=True)
        ]

    @property
    def unwatched_factor(self) -> float | None:
        """The factor by which the baseline's step times are corrected: the median over its runs.
        ``None``: they are not corrected."""
        if self.unwatched is None or not self.baseline_runs:
            return None
        return median(self._factor(done.process) for done in self.baseline_runs)

    def _factor(self, process: ProcessRecord) -> float:
        return 1.0 if self.unwatched is None else self.unwatched.factor(process)

    @property
    def _counted_blocks(self) -> list[list[quiet.Block]]:
        """For each pair, the blocks that ``times_ms`` uses; none if the pair does not count."""
        kept = [quiet.select(blocks, self.needs_quiet) for blocks in self.blocks]
        is_enough = sum(map(bool, kept)) >= min(quiet.FEWEST_COUNTED, self.count)
        return kept if is_enough else self.blocks

    @property
    def _zipped(self) -> list[tuple[Trial, Trial]]:
        return list(zip(self.baseline_runs, self.variant_runs, strict=False))

    @property
    def log_ratios(self) -> list[float]:
        """The logarithm of the ratio of each pair of ``times_ms``: the baseline's step time divided
        by the variant's."""
        return [math.log(one / other) for one, other in self.times_ms]

    @property
    def ratio(self) -> Ratio:
        """How many times faster the variant is.

        Raises:
            ValueError: there are fewer than two pairs.
        """
        return statistics.estimate_ratio(self.log_ratios)

    @property
    def whole_ratio(self) -> float:
        """The ratio of the times of all steps, outliers included, in the blocks that ``times_ms``
        uses.

        ``times_ms`` itself leaves out outliers. If the variant makes some steps slow, this ratio
        shows it.
        """
        return math.exp(
            fmean(
                math.log(self._factor(one.process)) + quiet.log_ratio(blocks)
                for (one, _), blocks in zip(self._zipped, self._counted_blocks, strict=True)
                if blocks
            )
        )

    @property
    def costs(self) -> tuple[Cost, Cost]:
        """The costs of baseline and variant. The ratio of their step times is ``ratio.value``."""
        baseline, variant = (
            _cost(runs[: self.count], geometric_mean(column))
            for runs, column in zip(
                (self.baseline_runs, self.variant_runs),
                zip(*self.times_ms, strict=True),
                strict=True,
            )
        )
        return baseline, variant

    @property
    def last_pair_s(self) -> float:
        """The wall time of the last pair, in seconds; 0 if there is none."""
        if not self.count:
            return 0.0
        both_s = [runs[self.count - 1].seconds for runs in (self.baseline_runs, self.variant_runs)]
        return max(both_s) if self.in_relay else sum(both_s)

    def steps(self, side: list[Trial]) -> list[list[Step]]:
        """Return, for one side, the steps of each run that is part of a complete pair.

        Args:
            side: ``baseline_runs`` or ``variant_runs``.
        """
        return [done.process.loop_steps for done in side[: self.count]]

    def without_effect(self) -> dict[str, str]:
        """Return the knobs of the variant that had no effect in any of its runs, each with the
        reason: the program made no call that the knob handles, or the knob refused to be applied.
        """
        idle = [_idle_knobs(done.process) for done in self.variant_runs]
        first = idle[0] if idle else {}
        return {
            name: why
            for name, why in first.items()
            if name in self.variant and all(name in one for one in idle)
        }


def _idle_knobs(process: ProcessRecord) -> dict[str, str]:
    applied = trial.collect_reasons(process, "applied")
    skipped = trial.collect_reasons(process, "skipped")
    refused = {name: why for name, why in skipped.items() if name not in applied}
    return refused | trial.collect_reasons(process, "unused")


def _passes_ms(steady: Sequence[Step], blocks: Sequence[quiet.Block], side: int) -> float:
    """Return the time that evaluation passes take, in ms per step.

    Args:
        steady: the steady steps of the run (``ProcessRecord.steady_steps``).
        blocks: the blocks that count.
        side: 0 for the baseline, 1 for the variant.
    """
    steps = [step.step_ms for block in blocks for step in steady[slice(*block.positions)]]
    whole_ms = 1e3 * sum((block.baseline_s, block.variant_s)[side] for block in blocks)
    return max(whole_ms - sum(steps), 0.0) / len(steps)


def late_captures_ms(process: ProcessRecord) -> float:
    """Return the time that captures take in the second half of the steady steps, in ms per step.

    Steady steps are the timed steps after the warm-up. A capture is the work of a knob that
    captures or compiles a part of the program while the program runs. If there are at least two
    captures in the second half, and no fewer than in the first half, they are likely to go on.
    Otherwise they belong to the start of a job (``Cost.warmup_s``), and the result is 0.
    """
    late = process.steady_steps[len(process.steady_steps) // 2 :]
    return 1e3 * sum(_find_late_captures_s(process)) / len(late) if late else 0.0


def _find_late_captures_s(process: ProcessRecord) -> list[float]:
    steady = process.steady_steps
    if not steady:
        return []
    begin_s, middle_s = steady[0].at_s, steady[len(steady) // 2].at_s
    late = [one.seconds for one in process.captures if one.at_s >= middle_s]
    early = [one for one in process.captures if begin_s <= one.at_s < middle_s]
    return late if len(late) >= max(len(early), 2) else []


def median_step_ms(processes: Sequence[ProcessRecord]) -> float:
    """Return the geometric mean of the median step times of one or more runs, in ms.

    Evaluation passes are left out.
    """
    return geometric_mean(
        median(step.step_ms for step in process.steady_steps) for process in processes
    )


def find_unlike_s(process: ProcessRecord) -> float:
    """Return the time that a run spends in steps that are unlike those that are compared, in
    seconds.

    Such a step takes at least ``UNLIKE_FACTOR`` times as long as the median step. For example, one
    step of L-BFGS calls the model hundreds of times. The result is 0 if these steps take less than
    ``UNLIKE_SHARE`` of the time of all steps.
    """
    times_ms = [step.step_ms for step in process.steady_steps]
    if not times_ms:
        return 0.0
    limit_ms = UNLIKE_FACTOR * median(times_ms)
    unlike_ms = sum(ms for ms in times_ms if ms >= limit_ms)
    return unlike_ms / 1e3 if unlike_ms >= UNLIKE_SHARE * sum(times_ms) else 0.0


def step_ms(process: ProcessRecord) -> float:
    """Return the mean time of a step after the warm-up, in ms.

    It includes the step's share of the evaluation passes. A median would scatter less, but it would
    leave out the evaluation passes, and whatever happens only at every tenth step. The user waits
    for these as well.

    Raises:
        ValueError: the run has no steps after the warm-up.
    """
    timed = process.steady_steps
    if not timed:
        raise ValueError(
            f"of {len(process.loop_steps)} steps, none is left after a warm-up of {WARMUP_STEPS}"
        )
    passes = process.evaluations_before(timed)
    return sum(step.step_ms for step in (*timed, *passes)) / len(timed)


def startup_s(process: ProcessRecord) -> float:
    """Return the time from the import of torch to the first step, in seconds.

    The record begins with this import.
    """
    return process.loop_steps[0].at_s


@dataclass(frozen=True)
class Cost:
    """The times that the runs of one side take.

    Attributes:
        startup_s: the time from the import of torch to the first step, in seconds; the median over
            the runs.
        warmup_s: the extra time of the first steps, in seconds: the time by which they are longer
            than as many later steps, plus the time of all captures that ``late_captures_ms`` does
            not count; the median over the runs.
        step_ms: the time of a step after the warm-up, in ms; the geometric mean over the runs.
    """

    startup_s: float
    warmup_s: float
    step_ms: float

    def job_s(self, steps: int) -> float:
        """Return the projected time of a job of this many steps, in seconds."""
        return self.startup_s + self.warmup_s + steps * self.step_ms / 1e3


def _cost(trials: Sequence[Trial], mean_step_ms: float) -> Cost:
    """Compute the times that the runs of one side take.

    Args:
        trials: the runs, at least one.
        mean_step_ms: the step time of these runs, see ``Pairs.costs``.
    """
    startups, warmups = [], []
    for done in trials:
        steps = done.process.loop_steps
        warmup = steps[:WARMUP_STEPS]
        first_s = sum(step.step_ms for step in warmup) / 1e3
        usual_s = len(warmup) * step_ms(done.process) / 1e3
        startups.append(startup_s(done.process))
        captures_s = sum(one.seconds for one in done.process.captures)
        captures_s -= sum(_find_late_captures_s(done.process))
        warmups.append(max(first_s - usual_s, 0.0) + captures_s)
    return Cost(median(startups), median(warmups), mean_step_ms)


def phases_ms(processes: Sequence[ProcessRecord], mean_step_ms: float) -> dict[str, float | None]:
    """Split the step time into the times of its parts (``document.PARTS``), in ms.

    A part that was not measured is ``None``; the others sum to the step time.

    Args:
        processes: the runs of one side, at least one.
        mean_step_ms: the step time of these runs. It is split in proportion to the mean share that
            each part has in the runs.
    """
    shares: dict[str, list[float]] = {}
    for process in processes:
        timed = process.steady_steps
        whole_ms = step_ms(process) * len(timed)
        for phase in PHASES:
            known = [ms for step in timed if (ms := step.phases_ms[phase]) is not None]
            if known:
                shares.setdefault(phase, []).append(sum(known) / whole_ms)
        passes = process.evaluations_before(timed)
        if passes:
            part = sum(step.step_ms for step in passes) / whole_ms
            shares.setdefault("evaluation", []).append(part)
    found: dict[str, float | None] = dict.fromkeys(PHASES)
    for name, of_runs in shares.items():
        found[name] = mean_step_ms * sum(of_runs) / len(processes)
    return found


def break_even_steps(bare: Cost, plan: Cost, tune_s: float) -> int | None:
    """Return after how many steps the plan has made up for the tune and for its own longer start.

    The result is ``None`` if the plan never does.

    Args:
        bare, plan: the costs of the two sides.
        tune_s: the time that the tune took, in seconds.
    """
    gain_s = (bare.step_ms - plan.step_ms) / 1e3
    longer_s = tune_s + plan.startup_s + plan.warmup_s - bare.startup_s - bare.warmup_s
    if gain_s <= 0:
        return None
    return max(0, math.ceil(longer_s / gain_s))


# Running pairs


def run(
    trials: Trials,
    pairs: Pairs,
    *,
    pace: Pace,
    steps: int,
    seed: int,
    is_enough: Callable[[Pairs], bool],
    print_line: Callable[[str], None],
    warmup_steps: int = WARMUP_STEPS,
    inspection: Inspection = PROOF_INSPECTION,
) -> None:
    """Run pairs until there are enough, and add them to ``pairs``.

    Args:
        trials: the runner of trials.
        pairs: the pairs to which the runs are added.
        pace: the pace of the bare program.
        steps: the number of steps of each run.
        seed: the seed of the first pair of runs; each later pair has the next one.
        is_enough: tells before each pair whether there are enough.
        print_line: prints a line of progress for each pair.
        warmup_steps: the minimum number of steps that each run of a relay makes before its first
            block.
        inspection: what each run of a relay records. Runs that do not alternate record
            ``PROOF_INSPECTION``.

    Raises:
        UserError: the baseline cannot run.
    """
    relay = size_relay(steps, pace.step_s, pace.cycle_steps, warmup_steps)
    pace.extra_s = 0.0
    while not is_enough(pairs):
        number = pairs.count
        try:
            if pairs.in_relay:
                limit_s = 2 * pace.limit_s(steps)
                _run_relay(trials, pairs, relay, steps, limit_s, seed + number, inspection)
            else:
                for is_variant in (False, True) if number % 2 == 0 else (True, False):
                    if pairs.failure is None:
                        _run_side(
                            trials, pairs, is_variant, pace=pace, steps=steps, seed=seed + number
                        )
        except KeyboardInterrupt:
            pairs.interrupted = True
            del pairs.baseline_runs[number:], pairs.variant_runs[number:]
            return
        except RelayFailedError as failed:
            if failed.place == 1 and number:
                pairs.failure = str(failed)
            elif number:
                raise to_user_error("the program fails when it runs again", failed.failure) from (
                    failed
                )
            else:
                print_line(
                    f"two runs at the same time failed ({failed}); from now on, the runs of a pair "
                    "run one after the other"
                )
                pairs.in_relay = False
                continue
        if pairs.failure is not None:
            return
        pace.learn_pair(steps, pairs.last_pair_s)
        print_line(f"pair {number + 1}: {_describe_last(pairs)}")


def _describe_last(pairs: Pairs) -> str:
    """Return what the last pair has shown."""
    last = Pairs(
        pairs.baseline,
        pairs.variant,
        pairs.baseline_runs[pairs.count - 1 : pairs.count],
        pairs.variant_runs[pairs.count - 1 : pairs.count],
        in_relay=pairs.in_relay,
    )
    ((one, other),) = last.times_ms
    found = f"{formatting.milliseconds(one)}, {formatting.milliseconds(other)}, {one / other:.2f}x"
    if last.counted_count:
        return found
    return f"{found}; this pair does not count: {quiet.describe_others(last.quietness.taken)}"


def size_relay(
    steps: int, step_s: float, cycle_steps: int = 1, warmup_steps: int = WARMUP_STEPS
) -> Relay:
    """Divide two runs of this many steps into the blocks in which they alternate.

    All blocks have the same number of steps. The steps that are left over come before the first
    block and belong to the warm-up.

    Args:
        steps: the number of steps of each run.
        step_s: the time of one step, in seconds.
        cycle_steps: the number of steps of a cycle of the program (``cycles.py``). If it is more
            than 1, the steps after the warm-up should be whole cycles, and all of them are timed.
        warmup_steps: the minimum number of steps of the warm-up.
    """
    usable = max(steps - warmup_steps, 1)
    longest = usable // FEWEST_RELAY_BLOCKS
    shortest = RELAY_BLOCK_STEPS if step_s < RELAY_SLOW_STEP_S else 1
    block_steps = max(shortest, min(round(RELAY_BLOCK_S / step_s), longest))
    block_steps = min(block_steps, usable)
    if cycle_steps > 1:  # if steps were left over, the blocks together would not be whole cycles
        block_steps = max(n for n in range(1, block_steps + 1) if usable % n == 0)
    blocks = max(usable // block_steps, 1)
    return Relay(
        folder="",
        place=0,
        block_steps=block_steps,
        discard_steps=0 if cycle_steps > 1 else int(block_steps * RELAY_DISCARD_SHARE),
        warmup_steps=steps - blocks * block_steps,
        blocks=blocks,
    )


def _run_relay(
    trials: Trials,
    pairs: Pairs,
    relay: Relay,
    steps: int,
    limit_s: float,
    seed: int,
    inspection: Inspection,
) -> None:
    """Run one pair whose runs alternate.

    Raises:
        RelayFailedError: one of the runs fails, or one of its knobs fails. ``place`` is 0 for the
            baseline, 1 for the variant.
    """
    baseline_begins = pairs.count % 2 == 0
    sides = (pairs.baseline, pairs.variant) if baseline_begins else (pairs.variant, pairs.baseline)
    one, other = (_request(s, seed=seed, inspection=inspection) for s in sides)
    try:
        done = trials.run_two((one, other), relay, limit_s)
        for place, settings in enumerate(sides):
            try:
                _check_complete(done[place], settings, steps, seed)
            except TrialFailedError as failure:
                raise RelayFailedError(place, failure) from failure
    except RelayFailedError as failed:
        if not baseline_begins:
            raise RelayFailedError(1 - failed.place, failed.failure) from failed
        raise
    baseline, variant = done if baseline_begins else done[::-1]
    pairs.baseline_runs.append(baseline)
    pairs.variant_runs.append(variant)


def run_once(
    trials: Trials,
    settings: Mapping[str, str],
    *,
    pace: Pace,
    steps: int,
    seed: int,
    inspection: Inspection = PROOF_INSPECTION,
) -> Trial:
    """Run the program once under some settings.

    Raises:
        TrialFailedError: the run fails or ends early, or one of its knobs fails.
    """
    request = _request(settings, seed=seed, inspection=inspection, stop_steps=steps)
    done = trials.run(request, pace.limit_s(steps))
    _check_complete(done, settings, steps, seed)
    return done


def _request(settings: Mapping[str, str], **asked: Any) -> Request:
    """Make the request of a run under some settings.

    Unless all of these settings are bitwise, the request turns on the guard, which watches
    gradients and weights for infinities and NaN (``agent/guard.py``). ``flatout run`` turns it on
    as well, so the guard's time is part of what the settings cost.
    """
    is_bitwise = all(knobs.is_bitwise(name, setting) for name, setting in settings.items())
    guard = None if is_bitwise else GuardRequest()
    return Request(settings=dict(settings), guard=guard, **asked)


def _check_complete(done: Trial, settings: Mapping[str, str], steps: int, seed: int) -> None:
    """Check that a run made enough steps, and that none of its knobs failed.

    Raises:
        TrialFailedError: the run ended early, or a knob failed.
    """
    for name, why in trial.collect_reasons(done.process, "failed").items():
        if name in settings:
            raise TrialFailedError(f"{name}: {why}", done.process, "")
    needed = min(MINIMUM_STEPS, steps)
    if len(done.process.loop_steps) < needed:
        raise TrialFailedError(
            f"with seed {seed} this program ends after {len(done.process.loop_steps)} steps, and "
            f"at least {needed} are needed",
            done.process,
            "",
        )


def _run_side(
    trials: Trials, pairs: Pairs, is_variant: bool, *, pace: Pace, steps: int, seed: int
) -> None:
    """Run one side of a pair alone. If the variant fails, the reason is entered in ``pairs``.

    Raises:
        UserError: the baseline fails.
    """
    settings = pairs.variant if is_variant else pairs.baseline
    side = pairs.variant_runs if is_variant else pairs.baseline_runs
    try:
        side.append(run_once(trials, settings, pace=pace, steps=steps, seed=seed))
    except TrialFailedError as failure:
        if not is_variant:
            raise to_user_error("the program fails when it runs again", failure) from failure
        pairs.failure = str(failure)


def to_user_error(message: str, failure: TrialFailedError) -> UserError:
    """Turn the failure of a trial into a user error that ends with the program's last lines.

    Args:
        message: a clause that tells what has failed. It is left out if other processes may be the
            cause.
        failure: the failure.
    """
    if failure.is_due_to_others:
        return UserError(str(failure))
    lines = f"; its last lines:\n{failure.tail}" if failure.tail else ""
    return UserError(f"{message}: {failure}{lines}")
