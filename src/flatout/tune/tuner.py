"""From a working program to a proven plan, or to the sentence that says why there is none.

1. One bare run: how many steps, how long, does it train at all?
2. The knobs that match take turns with the bare program inside one process, and rank themselves.
3. Bare and the stacked winners run in fresh processes, in alternation, one pair for each seed. The
   same pairs give the claimed ratio and the losses for the proof.
4. If the proof fails, each knob is put to it alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from flatout import knobs, machine, signature
from flatout.errors import UserError
from flatout.plan import Evidence
from flatout.record import ProcessRecord, Step
from flatout.request import Comparison, Request
from flatout.tune import proof, statistics, trial
from flatout.tune.proof import Verdict
from flatout.tune.statistics import Ratio
from flatout.tune.trial import Trial, TrialFailedError

WARMUP_STEPS = 3
"""Steps left out of every median: first calls, lazy initialisation."""

MINIMUM_STEPS = 20
"""Steps of a run below which neither a median nor a loss says much."""

MAXIMUM_STEPS = 200
"""Horizon of the proof unless the user asks for another."""

MINIMUM_PAIRS, MAXIMUM_PAIRS = 4, 12

BLOCK_STEPS, MINIMUM_BLOCK_STEPS, DISCARD_STEPS = 8, 4, 2
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 6, 40

FIRST_RUN_SHARE = 1 / 24
"""Share of the budget for the first bare run, and so for each of the later ones at most."""

COMPARISON_SHARE = 0.25
"""Share of the budget for the comparisons inside one process."""

PROFILE_STEPS = 5
"""Steps of the first run, after those that are timed, that show which operators there are."""

MAXIMUM_ARMS = 8
"""That take turns in one process; the steps of one arm should not lie too far apart."""


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
        budget_seconds: how long it may take, roughly.
        steps: horizon of the proof; ``None``: from the budget, at most ``MAXIMUM_STEPS``.
        seed: of the first pair; the others count up from it.
        isolate: run every trial in a copy-on-write view.
        knobs: to be tried; ``None``: all.
    """

    budget_seconds: float = 300.0
    steps: int | None = None
    seed: int = 0
    isolate: bool = True
    knobs: Collection[str] | None = None


@dataclass
class Outcome:
    """What came out.

    Attributes:
        settings: of the plan; empty when nothing helps.
        why: one sentence.
        evidence: of the plan, ``None`` when there is none.
        in_process: ratio of each knob alone inside one process.
        dropped: knobs that were not tried, or failed, with the reason.
        header: of the first run's record: interpreter, torch and so on.
        inputs: what went into the first outermost module call of every run, see
            ``flatout.signature``; ``None`` if there is nothing that all runs have in common.
        seconds: how long all of it took.
    """

    settings: dict[str, str] = field(default_factory=dict)
    why: str = ""
    evidence: Evidence | None = None
    in_process: dict[str, Ratio] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    header: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class _Pairs:
    """Bare and plan in fresh processes."""

    ratio: Ratio
    verdict: Verdict
    bare_step_ms: float
    plan_step_ms: float


class Tuner:
    """One tune of one job.

    Args:
        command: the job.
        options: what the user asks for.
        say: called with each line of progress.
        measure: gives the measured matrix product rates (FLOP/s by dtype name) for the job's
            interpreter and a device type.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Options,
        say: Callable[[str], None],
        measure: Callable[[str, str], Mapping[str, float | None]],
    ) -> None:
        self._command = command
        self._options = options
        self._say = say
        self._measure = measure
        self._started_s = time.monotonic()
        self._outcome = Outcome()
        self._available: int | None = None
        self._skips: dict[str, str] = {}

    def run(self) -> Outcome:
        """Tune.

        Raises:
            UserError: the program fails, never trains, or takes too few steps.
        """
        first = self._first_run()
        self._step_s = statistics.typical_step_ms(first.process.steps, WARMUP_STEPS) / 1e3
        self._startup_s = max(first.seconds - sum(s.step_ms for s in first.process.steps) / 1e3, 0)
        self._bare_steps = [step for step in first.process.steps if step.mark is None]
        self._steps = self._options.steps or max(len(self._bare_steps), MINIMUM_STEPS)
        self._first = first
        self._available = len(first.process.steps) if first.ended else None
        self._outcome.header = first.process.header
        self._outcome.inputs = first.process.inputs
        self._say(
            f"bare: {self._step_s * 1e3:.4g} ms a step (median of {len(self._bare_steps)} "
            f"steps), {self._startup_s:.1f} s of start-up"
        )
        settings = self._winners(self._candidates())
        if settings:
            self._settle(settings)
        elif not self._outcome.why:
            self._outcome.why = "no setting is faster than the bare program, beyond noise"
        self._outcome.seconds = time.monotonic() - self._started_s
        return self._outcome

    # The bare program

    def _first_run(self) -> Trial:
        options = self._options
        limit_s = options.budget_seconds * FIRST_RUN_SHARE
        request = Request(
            seed=options.seed,
            stop_steps=options.steps or MAXIMUM_STEPS,
            stop_seconds=None if options.steps else limit_s,
            profile_steps=PROFILE_STEPS,
        )
        self._say("running the bare program to see how it trains")
        try:
            first = self._trial(request, timeout_seconds=max(2 * options.budget_seconds, 120))
        except TrialFailedError as failure:
            raise _said(f"the program does not run: {failure}", failure) from failure
        process = first.process
        if not process.trains:
            if process.evaluations:
                raise UserError(
                    "this program only runs inference; tune needs a training loop, while "
                    "'flatout doctor' works on it"
                )
            raise UserError("this program never calls a model or backward: there is no step")
        needed = max(MINIMUM_STEPS, options.steps or 0)
        if first.ended and len(process.steps) < needed:
            raise UserError(
                f"this program ends after {len(process.steps)} training steps, tune needs at "
                f"least {needed}"
            )
        if len(process.steps) <= WARMUP_STEPS:
            raise UserError(
                f"in {limit_s:.0f} s the program made {len(process.steps)} training steps; give "
                "tune a longer --budget, or --steps"
            )
        return first

    # Candidates, and their comparison inside one process

    def _candidates(self) -> dict[str, str]:
        header, steps = self._first.process.header, self._bare_steps
        on_accelerator = any(step.peak_device_bytes for step in steps)
        device = str(header["accelerator"]) if on_accelerator else "cpu"
        facts = knobs.Facts(
            device=device,
            matmul_flops_per_s=self._measure(str(header["executable"]), device),
            updates=any(step.updates for step in steps),
            huge_pages=machine.huge_pages(),
            threads=header["threads"],
            operators=_operators(self._first.process),
            data_share=_data_share(steps),
        )
        candidates = {}
        wanted = self._options.knobs
        for name, knob in knobs.registry().items():
            if wanted is not None and name not in wanted:
                continue
            match = knob.offer(facts)
            if match.settings and knob.hot:
                candidates[name] = match.settings[0]
            else:
                self._drop(name, match.refusal or "it needs a process of its own")
        return candidates

    def _winners(self, candidates: dict[str, str]) -> dict[str, str]:
        """The candidates that are faster inside one process."""
        winners = {}
        groups = self._groups(candidates)
        for group in groups:
            for name, ratio in self._compare(group, 1 / len(groups)).items():
                self._outcome.in_process[name] = ratio
                self._say(f"{name}={candidates[name]}: {ratio} inside one process")
                if ratio.low > 1:
                    winners[name] = candidates[name]
                else:
                    self._drop(name, self._skips.get(name, "it is not faster, beyond noise"))
        return winners

    def _groups(self, candidates: Mapping[str, str]) -> list[dict[str, str]]:
        """The candidates in as few parts as a program of this length can compare at a time."""
        size = MAXIMUM_ARMS - 1
        if self._available is not None:
            arms = (self._available - WARMUP_STEPS) // (MINIMUM_ROUNDS * MINIMUM_BLOCK_STEPS)
            size = min(max(arms - 1, 1), size)
        parts = math.ceil(len(candidates) / size)
        items = list(candidates.items())
        return [dict(items[part::parts]) for part in range(parts)]

    def _compare(self, candidates: dict[str, str], share: float) -> dict[str, Ratio]:
        """Compare each candidate with bare; those that fail are dropped, the rest tried again.

        Args:
            candidates: to be compared, those that fail are taken out.
            share: of the time for all comparisons.
        """
        while candidates:
            comparison = self._comparison(candidates, share)
            self._say(
                f"comparing {_in_words(candidates)} with bare inside one process, "
                f"{comparison.rounds} rounds of {comparison.block_steps} steps each"
            )
            names = list(candidates)
            try:
                done = self._trial(
                    Request(comparison=comparison, seed=self._options.seed),
                    steps=_length(comparison),
                )
            except TrialFailedError as failure:
                culprit = _arm_at_the_end(failure)
                if not culprit:
                    raise _said(f"the program fails when it runs again: {failure}", failure) from (
                        failure
                    )
                name = names[culprit - 1]
                self._drop(name, f"the program fails under it: {failure}")
                del candidates[name]
                continue
            failures = trial.reasons(done.process, "failed")
            self._skips = trial.reasons(done.process, "skipped")
            by_arm = statistics.in_process_ratios(
                statistics.blocks(done.process.steps, DISCARD_STEPS),
                comparison.block_steps - DISCARD_STEPS,
            )
            failed = {
                name: failures.get(f"arm {arm}", failures.get(name))
                for arm, name in enumerate(names, 1)
            }
            for name, why in failed.items():
                if why is not None:
                    self._drop(name, why)
                    del candidates[name]
            ratios = {
                name: by_arm[arm]
                for arm, name in enumerate(names, 1)
                if arm in by_arm and name in candidates
            }
            if ratios.keys() == candidates.keys():
                return ratios
            if len(candidates) == len(names):  # nothing failed, so the program ended too early
                steps = len(done.process.steps)
                if not done.ended or self._available == steps:
                    raise UserError(f"the comparison of {_in_words(candidates)} gave no ratio")
                self._available = steps
        return {}

    def _comparison(self, candidates: Mapping[str, str], share: float) -> Comparison:
        """As long as the budget and the program allow.

        Raises:
            UserError: the program ends too early to compare anything.
        """
        arms: tuple[dict[str, str], ...] = ({}, *({k: s} for k, s in candidates.items()))
        seconds = self._options.budget_seconds * COMPARISON_SHARE * share
        rounds = int(seconds / (self._step_s * BLOCK_STEPS * len(arms))) // 2 * 2
        rounds = min(max(rounds, MINIMUM_ROUNDS), MAXIMUM_ROUNDS)
        block_steps = BLOCK_STEPS
        if self._available is not None:
            usable = self._available - WARMUP_STEPS
            rounds = min(rounds, max(usable // (block_steps * len(arms)) // 2 * 2, MINIMUM_ROUNDS))
            block_steps = min(block_steps, usable // (rounds * len(arms)))
            if block_steps < MINIMUM_BLOCK_STEPS:
                needed = WARMUP_STEPS + MINIMUM_ROUNDS * MINIMUM_BLOCK_STEPS * len(arms)
                raise UserError(
                    f"this program ends after {self._available} training steps; to compare "
                    f"{_in_words(candidates)} with bare, tune needs at least {needed}"
                )
        return Comparison(
            arms=arms,
            block_steps=block_steps,
            discard_steps=DISCARD_STEPS,
            warmup_steps=WARMUP_STEPS,
            rounds=rounds,
        )

    # Claim and proof, in fresh processes

    def _settle(self, settings: dict[str, str]) -> None:
        """Find the settings among the winners that are proven and faster; fill in the outcome."""
        pairs = self._try(settings)
        if pairs is not None and not pairs.verdict.passed and len(settings) > 1:
            self._say("looking for the culprit: each knob alone")
            alone = {name: self._try({name: setting}) for name, setting in settings.items()}
            proven = {
                name: settings[name]
                for name, result in alone.items()
                if result is not None and result.verdict.passed
            }
            for name, result in alone.items():
                if name not in proven:
                    self._drop(name, "not proven: " + (result.verdict.why if result else "failed"))
            if len(proven) == len(settings):  # harmless alone, not together: keep the fastest
                best = max(proven, key=lambda name: self._outcome.in_process[name].value)
                for name in proven.keys() - {best}:
                    self._drop(name, f"not proven together with {best}")
                proven = {best: proven[best]}
            settings = proven
            pairs = alone[next(iter(proven))] if len(proven) == 1 else None
            if len(proven) > 1:
                pairs = self._try(proven)
        if pairs is None:
            self._outcome.why = self._outcome.why or "no faster setting could be proven"
        elif not pairs.verdict.passed:
            self._outcome.why = f"{_in_words(settings)} is not proven: {pairs.verdict.why}"
        elif pairs.ratio.low <= 1:
            self._outcome.why = (
                f"{_in_words(settings)} gives {pairs.ratio} in fresh processes: "
                "no gain beyond noise"
            )
        else:
            self._accept(settings, pairs)

    def _accept(self, settings: dict[str, str], pairs: _Pairs) -> None:
        ratio, verdict = pairs.ratio, pairs.verdict
        self._outcome.settings = settings
        self._outcome.why = f"{_in_words(settings)} gives {ratio}, and {verdict.why}"
        self._outcome.evidence = Evidence(
            settings=dict(settings),
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            pairs=ratio.pairs,
            bare_step_ms=pairs.bare_step_ms,
            plan_step_ms=pairs.plan_step_ms,
            steps=verdict.steps,
            seeds=ratio.pairs if any(loss.yardstick == "seeds" for loss in verdict.losses) else 1,
            bare_repeats=verdict.bare_repeats,
            verdict=verdict.kind,
            in_process={name: self._outcome.in_process[name].value for name in settings},
            losses=verdict.losses,
            checks=verdict.checks,
        )

    def _try(self, settings: dict[str, str]) -> _Pairs | None:
        """Bare and the settings in alternation (bare, plan, plan, bare, ...), a seed for each pair.

        Returns ``None`` when a run under the settings fails; the outcome then says why.
        """
        pairs = self._affordable_pairs()
        self._say(
            f"{_in_words(settings)} against bare in fresh processes: {pairs} pairs of "
            f"{self._steps} steps, the same seed in each pair"
        )
        runs: dict[bool, list[list[Step]]] = {False: [], True: []}
        for number in range(pairs):
            for with_plan in (False, True) if number % 2 == 0 else (True, False):
                request = Request(
                    settings=settings if with_plan else {},
                    stop_steps=self._steps,
                    seed=self._options.seed + number,
                )
                try:
                    done = self._trial(request, steps=self._steps)
                except TrialFailedError as failure:
                    if not with_plan:
                        raise _said(
                            f"the program fails when it runs again: {failure}", failure
                        ) from failure
                    self._failed(settings, str(failure))
                    return None
                for name, why in trial.reasons(done.process, "failed").items():
                    if name in settings:
                        self._failed(settings, f"{name}: {why}")
                        return None
                if len(done.process.steps) < MINIMUM_STEPS:
                    if not with_plan:
                        raise UserError(
                            f"with seed {request.seed} this program ends after "
                            f"{len(done.process.steps)} training steps, tune needs at least "
                            f"{MINIMUM_STEPS}"
                        )
                    self._failed(settings, "the program ends earlier under it")
                    return None
                runs[with_plan].append(done.process.steps)
                self._outcome.inputs = _in_common(self._outcome.inputs, done.process.inputs)
            bare_ms, plan_ms = (
                statistics.typical_step_ms(runs[with_plan][-1], WARMUP_STEPS)
                for with_plan in (False, True)
            )
            self._say(
                f"pair {number + 1} of {pairs}: {bare_ms:.4g} ms bare, {plan_ms:.4g} ms with the "
                f"plan, {bare_ms / plan_ms:.2f}x"
            )
        times_ms = {
            with_plan: [
                statistics.typical_step_ms(steps, WARMUP_STEPS) for steps in runs[with_plan]
            ]
            for with_plan in (False, True)
        }
        ratio = statistics.claimed(
            [math.log(b / p) for b, p in zip(times_ms[False], times_ms[True], strict=True)]
        )
        verdict = proof.judge(
            [proof.Run(proof.curves(steps)) for steps in runs[False]],
            [proof.Run(proof.curves(steps)) for steps in runs[True]],
            proof.Run(proof.curves(self._bare_steps)),
            proof.exactness(settings),
        )
        self._say(f"{_in_words(settings)}: {ratio}; {verdict.why}")
        return _Pairs(ratio, verdict, median(times_ms[False]), median(times_ms[True]))

    def _failed(self, settings: Mapping[str, str], why: str) -> None:
        self._outcome.why = f"{_in_words(settings)} fails in a fresh process: {why}"
        self._say(self._outcome.why)

    def _affordable_pairs(self) -> int:
        left_s = self._options.budget_seconds - (time.monotonic() - self._started_s)
        pair_s = 2 * (self._startup_s + self._steps * self._step_s)
        return min(max(int(left_s / pair_s), MINIMUM_PAIRS), MAXIMUM_PAIRS)

    # All trials

    def _trial(
        self, request: Request, *, steps: int = 0, timeout_seconds: float | None = None
    ) -> Trial:
        """One trial; its limit is several times what the bare program needs for ``steps``."""
        if timeout_seconds is None:
            timeout_seconds = 60 + 5 * (self._startup_s + steps * self._step_s)
        return trial.run(
            self._command, request, isolate=self._options.isolate, timeout_seconds=timeout_seconds
        )

    def _drop(self, name: str, why: str) -> None:
        self._outcome.dropped[name] = why
        self._say(f"{name} is left out: {why}")


def _in_common(
    one: tuple[str, ...] | None, other: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    return None if one is None or other is None else signature.merged(one, other)


def _length(comparison: Comparison) -> int:
    blocks = len(comparison.arms) * comparison.rounds
    return comparison.warmup_steps + blocks * comparison.block_steps


def _in_words(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={setting}" for name, setting in settings.items())


def _arm_at_the_end(failure: TrialFailedError) -> int | None:
    """The arm whose turn it was when the process ended."""
    if failure.process is None:
        return None
    turns = [e.subject for e in failure.process.events if e.subject.startswith("arm ")]
    return int(turns[-1].removeprefix("arm ")) if turns else None


def _operators(process: ProcessRecord) -> frozenset[str] | None:
    """Names of the operators in the profiled steps; nothing if the program ended before them."""
    if process.profile is None:
        return None
    return frozenset(operator["name"] for operator in process.profile["operators"])


def _data_share(steps: Sequence[Step]) -> float | None:
    """Of the time of steps, waiting for data."""
    timed = steps[WARMUP_STEPS:]
    total_ms = sum(step.step_ms for step in timed)
    return sum(step.phases_ms["data"] or 0.0 for step in timed) / total_ms if timed else None


def _said(message: str, failure: TrialFailedError) -> UserError:
    """A user error that ends with the program's last lines."""
    lines = f"; its last lines:\n{failure.tail}" if failure.tail else ""
    return UserError(f"{message}{lines}")
