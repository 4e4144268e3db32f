"""From a working program to a proven plan, or to the sentence that says why there is none.

1. One bare run: how many steps, how long, what takes the time, does it train at all?
2. Candidates: the knobs that match this profile and have something to gain.
3. The hot ones take turns with the bare program inside one process, and rank themselves; the
   winners are stacked, and compared with the stack less each of them. What was too small a part of
   the bare step to tell is looked at again on top of the stack.
4. The cold ones are tried on top of the stack, in fresh processes in alternation.
5. Bare and the plan run in fresh processes, in alternation, one pair for each seed. The same pairs
   give the claimed ratio and the losses for the proof.
6. If the proof fails, the culprit is found, turned to its gentler setting or off, and 5. repeated.

Everything that is decided here depends on the trials' results and on the time they took, both of
which are in the journal: a tune that was killed goes on from there (see ``journal.py``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from flatout import knobs, machine
from flatout.doctor.case import Case
from flatout.doctor.findings import Finding, find_all
from flatout.errors import UserError
from flatout.knob import Exactness
from flatout.machine import Ceilings
from flatout.plan import Evidence
from flatout.plan import program as programs
from flatout.plan.program import Program
from flatout.tune import candidates, design, figures, memory, pairs, search, statistics, trial
from flatout.tune.candidates import Candidate
from flatout.tune.document import Stage, State
from flatout.tune.journal import Journal
from flatout.tune.pairs import MINIMUM_STEPS, WARMUP_STEPS, Pace, Pairs
from flatout.tune.progress import Phase
from flatout.tune.proof import Verdict
from flatout.tune.prover import GRADIENT_SEEDS, GRADIENT_STEPS, Prover, in_words
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire import signature
from flatout.wire.ratios import MINIMUM_FREEDOM, Ratio, arm_ratios, setting_ratios
from flatout.wire.request import Comparison, Request

USUAL_STEPS, USUAL_S, MAXIMUM_STEPS = 200, 2.0, 2000
"""Horizon of the proof unless the user asks for another: the first, or, of fast steps, as many as
take the second, up to the third."""

USUAL_PAIRS, MAXIMUM_PAIRS = 8, 24
"""Behind a claim: time for the first is kept free, more than the second are never made."""

SHORT_STEPS, SHORT_S = 25, 1.0
"""Of a run that only ranks, at least as many and as long, if the proof is not shorter."""

SLOW_START_S = 120.0
"""What compiling takes in all of these, about: later processes find most of it in the cache."""

BLOCK_STEPS, MINIMUM_BLOCK_STEPS, DISCARD_STEPS = 4, 3, 1
BLOCK_S = 0.02
"""Blocks inside one process take at least as long, a quarter of it discarded: in a shorter one,
what a switch leaves behind would count."""

MAXIMUM_ROUNDS = 40

FIRST_RUN_SHARE = 1 / 36
"""Share of the budget for the steps of the first bare run, and so of each later one at most."""

COMPARISON_SHARE = 0.15
"""Share of the budget for the comparisons inside one process."""

COLD_SHARE = 0.3
"""Share of the budget that any knob that needs processes of its own may take; more, if proof and
claim leave it."""

PROFILE_STEPS = 5
"""Steps of the first run, after those that are timed, that show which operators there are."""

MAXIMUM_CANDIDATES = 11
"""That are compared in one process: in 24 stacks (``design.stacks``)."""

GRADIENTS_PHASE = "proving the plan: comparing its gradients with the bare program's"
PROOF_PHASE = "proving the plan"

MAXIMUM_PROOFS = 4
"""Plans that are put to the proof one after the other, each gentler than the one before."""


@dataclass(frozen=True)
class Options:
    """What the user asks for.

    Attributes:
        budget_seconds: how long it may take, roughly.
        steps: horizon of the proof; ``None``: from the budget, see ``USUAL_STEPS``.
        seed: of the first pair; the others count up from it.
        isolate: run every trial in a copy-on-write view.
        knobs: to be tried; ``None``: all.
        exactness: classes of the settings that may be tried; ``None``: all.
        memory: peak memory that is allowed, as a multiple of bare's.
    """

    budget_seconds: float = 300.0
    steps: int | None = None
    seed: int = 0
    isolate: bool = True
    knobs: Collection[str] | None = None
    exactness: Collection[Exactness] | None = None
    memory: float = memory.ALLOWED


@dataclass
class Arm:
    """A candidate and what has become of it; see ``document.Arm``."""

    settings: Mapping[str, str]
    stage: Stage = "inside one process"
    ratio: Ratio | None = None
    state: State = "not tried"
    why: str = ""
    bound: float | None = None


@dataclass
class Outcome:
    """What came out.

    Attributes:
        settings: of the plan; empty when nothing helps.
        why: one sentence.
        evidence: of the plan, ``None`` when there is none.
        arms: what was tried, and what was not, in that order.
        without: for each knob of a stack, the ratio of the stack with it over that without it.
        refused: knobs that are no candidates, with the reason.
        findings: what limits the bare program.
        pairs: behind the plan, ``None`` when there is none.
        verdict: of the last proof.
        pace: of bare.
        phases_ms: of a step of bare; ``None``: not measured.
        header: of the first run's record: interpreter, torch and so on.
        inputs: what went into the first outermost module call of every run, see
            ``flatout.signature``; ``None`` if there is nothing that all runs have in common.
        program: what it was at the first run; ``None``: it has not run.
        modules: files that the runs have imported.
        job_steps: how many steps the whole job has, ``None``: not known.
        interrupted: whether the user has ended it.
        seconds: how long all of it took.
        phase: what is being done now; ``None``: nothing has begun.
    """

    settings: dict[str, str] = field(default_factory=dict)
    why: str = ""
    evidence: Evidence | None = None
    arms: list[Arm] = field(default_factory=list)
    without: dict[str, Ratio] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    pairs: Pairs | None = None
    verdict: Verdict | None = None
    pace: Pace | None = None
    phases_ms: Mapping[str, float | None] = field(default_factory=dict)
    header: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] | None = None
    program: Program | None = None
    modules: frozenset[str] = frozenset()
    job_steps: int | None = None
    interrupted: bool = False
    seconds: float = 0.0
    phase: Phase | None = None

    def alone(self, knob: str) -> Ratio | None:
        """The ratio of a knob alone inside one process, ``None``: not measured."""
        return self._ratio(knob, "inside one process")

    def on_top(self, knob: str) -> Ratio | None:
        """The ratio of the stack with a knob over that without it, ``None``: not measured."""
        return self.without.get(knob) or self._ratio(knob, "fresh processes")

    def _ratio(self, knob: str, stage: Stage) -> Ratio | None:
        for arm in self.arms:
            if set(arm.settings) == {knob} and arm.stage == stage and arm.ratio is not None:
                return arm.ratio
        return None


class Tuner:
    """One tune of one job.

    Args:
        command: the job.
        options: what the user asks for.
        journal: of this tune.
        say: called with each line of progress.
        show: called with the outcome so far and the seconds left in its phase, whenever an arm or
            the phase has changed, and twice a second while a trial runs.
        ceilings: what the machine can do for an interpreter, ``None``: not known.
    """

    def __init__(
        self,
        command: Sequence[str],
        options: Options,
        journal: Journal,
        say: Callable[[str], None],
        show: Callable[[Outcome, float], None],
        ceilings: Callable[[str], Ceilings | None],
    ) -> None:
        self._command = command
        self._journal = journal
        self._options = options
        self._trials = Trials(command, journal, options.isolate, tick=self._changed)
        self._say = say
        self._show = show
        self._ceilings = ceilings
        self._outcome = Outcome()
        self._available: int | None = None
        self._offered: dict[str, list[str]] = {}

    def run(self) -> Outcome:
        """Tune; after an interruption, what has been proven until then.

        Raises:
            UserError: the program fails, never trains, or takes too few steps.
        """
        outcome = self._outcome
        try:
            self._tune()
        except KeyboardInterrupt:
            outcome.interrupted = True
        if outcome.interrupted and outcome.evidence is None:
            outcome.why = "it was interrupted before a plan was proven"
        outcome.seconds = self._trials.spent_s
        return outcome

    def verify(self, settings: Mapping[str, str], count: int) -> Outcome:
        """Put a plan to the proof; the outcome has evidence if it passes, however fast it is.

        Args:
            settings: of the plan.
            count: of pairs, a seed each.

        Raises:
            UserError: the program fails, never trains, or takes too few steps.
        """
        outcome = self._outcome
        try:
            self._first_run()
            made = Pairs({}, dict(settings), in_relay=self._can_relay(settings))
            self._begin(GRADIENTS_PHASE)
            refusal = self._prover.gradients_refusal(settings, count)
            if refusal is None:
                self._alternate(
                    made, lambda made: made.count >= count, self._steps, PROOF_PHASE, count
                )
                outcome.interrupted = made.interrupted
                refusal = self._refusal(made)
            for name, why in _without_effect(made).items():
                self._say(f"{name}={settings[name]} has no effect: {why}")
            if refusal is None:
                self._accept(dict(settings), made)
            else:
                outcome.why = f"{in_words(settings)} is not proven: {refusal}"
        except KeyboardInterrupt:
            outcome.interrupted = True
            outcome.why = "it was interrupted before there was a proof"
        outcome.seconds = self._trials.spent_s
        return outcome

    def _tune(self) -> None:
        first = self._first_run()
        found = self._candidates(first)
        cold = [candidate for candidate in found if not candidate.is_hot]
        hot = [candidate for candidate in found if candidate.is_hot]
        stack = self._look_again(self._stack(self._screen(hot)), hot)
        settings = self._cold(stack, cold)
        if settings:
            self._settle(settings, cold)
        else:
            self._outcome.why = "no setting is faster than the bare program, beyond noise"

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
        self._begin("running the bare program")
        self._say("running the bare program to see how it trains")
        try:
            first = self._trials.run(request, max(2 * options.budget_seconds, 120))
        except TrialFailedError as failure:
            raise pairs.said("the program does not run", failure) from failure
        process = first.process
        if not process.turns:
            raise UserError("this program never calls a model or backward: there is no step")
        needed = max(MINIMUM_STEPS, options.steps or 0)
        if first.ended and len(process.turns) < needed:
            raise UserError(
                f"this program ends after {len(process.turns)} steps, tune needs at least {needed}"
            )
        timed = [step for step in process.turns if step.mark is None]
        if len(timed) <= WARMUP_STEPS:
            raise UserError(
                f"in {limit_s:.1f} s from its first step on, the program made {len(timed)} steps; "
                "give tune a longer --budget, or --steps"
            )
        outcome = self._outcome
        outcome.header, outcome.inputs = process.header, process.inputs
        outcome.modules = first.modules
        outcome.program = programs.observed(self._command, first.modules)
        self._journal.hold(outcome.program)
        step_s = pairs.step_ms(process) / 1e3
        in_steps_s = sum(step.step_ms for step in process.turns) / 1e3
        outcome.phases_ms = pairs.phases_ms([process], step_s * 1e3)
        self._pace = outcome.pace = Pace(max(first.seconds - in_steps_s, 0), step_s)
        self._first = first
        longest = max(USUAL_STEPS, int(USUAL_S / step_s))
        self._steps = options.steps or max(min(len(timed), longest), MINIMUM_STEPS)
        self._prover = Prover(
            self._trials,
            first,
            pace=self._pace,
            steps=self._steps,
            seed=options.seed,
            memory=options.memory,
            say=self._say,
        )
        if first.ended:
            self._available = outcome.job_steps = len(process.turns)
        self._say(
            f"bare: {figures.milliseconds(step_s * 1e3)} a step ({len(timed)} steps), "
            f"{self._pace.startup_s:.1f} s of start-up"
        )
        return first

    # Candidates

    def _candidates(self, first: Trial) -> list[Candidate]:
        header = first.process.header
        case = Case(
            first.process, self._ceilings(str(header["executable"])), machine.usable_cores()
        )
        self._outcome.findings = find_all(case)
        known = candidates.facts(case)
        found, refused = candidates.find(known, self._options.knobs, self._options.exactness)
        self._outcome.refused = refused
        for name in knobs.registry():
            self._offered[name] = list(knobs.get(name).offer(known).settings)
        for name, why in refused.items():
            self._say(f"{name} is not tried: {why}")
        for candidate in found:
            self._outcome.arms.append(Arm(candidate.settings, bound=candidate.bound))
        self._changed()
        return found

    # Inside one process

    def _screen(self, hot: Sequence[Candidate]) -> dict[str, str]:
        """The best setting of each hot knob that is faster, the fastest first.

        They are compared in stacks, which tell what each brings among the others; only where one
        of them ends the program, each alone, which tells which one it is.
        """
        best: dict[str, tuple[float, str]] = {}
        try:
            self._compare_stacks(hot)
        except TrialFailedError as failure:
            self._say(f"the program fails under several knobs, each is tried alone: {failure}")
            self._compare_alone(hot)
        for candidate in hot:
            arm = self._arm(candidate.settings)
            if arm.ratio is None:
                continue
            self._say(f"{candidate}: {arm.ratio} inside one process")
            if statistics.winners({str(candidate): arm.ratio}):
                arm.state = "won"
                setting = (arm.ratio.value, candidate.setting)
                best[candidate.knob] = max(best.get(candidate.knob, (0.0, "")), setting)
            else:
                arm.state = "no gain"
            self._changed()
        ordered = sorted(best.items(), key=lambda item: -item[1][0])
        return {knob: setting for knob, (_, setting) in ordered}

    def _compare_stacks(self, hot: Sequence[Candidate]) -> None:
        """Fill in the ratio of each candidate among the others; those that fail are out.

        Raises:
            TrialFailedError: the program failed under a stack of several.
        """
        groups = self._groups(hot)
        for group in groups:
            stacks = design.stacks(_factors(group))
            share = COMPARISON_SHARE / len(groups)
            done, comparison = self._compare(stacks, "settings", share, group)
            failures = trial.reasons(done.process, "failed")
            applied = [
                {knob: setting for knob, setting in stack.items() if knob not in failures}
                for stack in stacks
            ]
            ratios = setting_ratios(
                statistics.complete_blocks(done.process.turns, comparison), applied
            )
            skips = trial.reasons(done.process, "skipped")
            unused = trial.reasons(done.process, "unused")
            for candidate in group:
                arm = self._arm(candidate.settings)
                if candidate.knob in failures:
                    self._fail(arm, failures[candidate.knob])
                    continue
                if candidate.knob in unused:
                    self._has_no_effect(arm, unused[candidate.knob])
                    continue
                arm.ratio = ratios.get((candidate.knob, candidate.setting))
                arm.why = skips.get(candidate.knob, "")
                if arm.ratio is None:
                    arm.state = "not tried"
                    arm.why = "its steps were too few to tell it from the others"
                    self._say(f"{candidate} is not judged: {arm.why}")

    def _compare_alone(self, hot: Sequence[Candidate]) -> None:
        """Fill in the ratio of each candidate alone; those that fail are out."""
        for group in self._groups(hot):
            left = [candidate for candidate in group if self._arm(candidate.settings).ratio is None]
            while left:
                arms = ({}, *(candidate.settings for candidate in left))
                try:
                    done, comparison = self._compare(arms, "arms", COMPARISON_SHARE, left)
                except TrialFailedError as failure:
                    at = _arm_at_the_end(failure)
                    if not at:
                        raise pairs.said("the program fails when it runs again", failure) from (
                            failure
                        )
                    culprit = self._arm(left.pop(at - 1).settings)
                    self._fail(culprit, f"the program fails under it: {failure}")
                    continue
                failures = trial.reasons(done.process, "skipped", "failed")
                unused = trial.reasons(done.process, "unused")
                ratios = arm_ratios(statistics.complete_blocks(done.process.turns, comparison))
                for number, candidate in enumerate(left, 1):
                    arm = self._arm(candidate.settings)
                    if f"arm {number}" in failures:
                        self._fail(arm, failures[f"arm {number}"])
                    elif candidate.knob in unused:
                        self._has_no_effect(arm, unused[candidate.knob])
                    else:
                        arm.ratio = ratios.get(number)
                break

    def _stack(self, settings: dict[str, str]) -> dict[str, str]:
        """The winners together, without those that gain nothing on top of the others."""
        if len(settings) < 2 or self._available is not None:
            return settings
        stacks = (
            settings,
            *({k: s for k, s in settings.items() if k != left_out} for left_out in settings),
        )
        found = self._to_first(stacks, "arms", "the stack less each of its knobs")
        without = {knob: found[n] for n, knob in enumerate(settings, 1) if n in found}
        for knob, ratio in without.items():
            gain = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.pairs)
            self._outcome.without[knob] = gain
            self._say(f"{knob} on top of the others: {gain} inside one process")
        kept = dict(settings)
        for knob in statistics.redundant(without)[: len(settings) - 1]:
            self._leave_out(knob, kept.pop(knob), "the other settings are as fast without it")
        return kept

    def _look_again(self, stack: dict[str, str], hot: Sequence[Candidate]) -> dict[str, str]:
        """The stack with what gains something on top of it, and was not seen to in the bare step.

        Args:
            stack: the winners.
            hot: what was compared.
        """
        arms_of = {candidate: self._arm(candidate.settings) for candidate in hot}
        ratios = {c: arm.ratio for c, arm in arms_of.items() if arm.state != "left out"}
        again = candidates.second_looks(ratios, stack)
        if not again or self._available is not None:
            return stack
        arms = (stack, *(stack | {knob: setting} for knob, setting in again.items()))
        found = self._to_first(arms, None, f"once more {in_words(again)}, on top of the stack")
        gains = {knob: found[n] for n, knob in enumerate(again, 1) if n in found}
        for knob, gain in gains.items():
            self._outcome.without[knob] = gain
            self._say(f"{knob} on top of the others: {gain} inside one process")
        grown = dict(stack)
        for knob in statistics.winners(gains):
            grown[knob] = again[knob]
            arm = self._arm({knob: again[knob]})
            arm.state, arm.why = "won", f"{gains[knob]} on top of the others"
        self._changed()
        return grown

    def _to_first(
        self,
        arms: Sequence[Mapping[str, str]],
        decide: Literal["arms", "settings"] | None,
        what: str,
    ) -> dict[int, Ratio]:
        """Ratios of arms to the first of them; none, and said so, where the program fails."""
        try:
            done, comparison = self._compare(arms, decide, COMPARISON_SHARE / 2, what)
        except TrialFailedError as failure:
            self._say(f"{what}: not known: {failure}")
            return {}
        return arm_ratios(statistics.complete_blocks(done.process.turns, comparison))

    def _groups(self, hot: Sequence[Candidate]) -> list[list[Candidate]]:
        """The candidates in as few parts as a program of this length can compare at a time."""
        if not hot:
            return []
        size = MAXIMUM_CANDIDATES
        if self._available is not None:
            blocks = (self._available - WARMUP_STEPS) // MINIMUM_BLOCK_STEPS
            size = 3 if blocks < 2 * _fewest_rounds(16) * 16 else size
        count = -(-len(hot) // size)
        return [list(hot[part::count]) for part in range(count)]

    def _compare(
        self,
        arms: Sequence[Mapping[str, str]],
        decide: Literal["arms", "settings"] | None,
        share: float,
        of: Sequence[Candidate] | str,
    ) -> tuple[Trial, Comparison]:
        """Let arms take turns inside one process.

        Args:
            arms: the first is what the others are compared with.
            decide: what ends it before its time, see ``Comparison``.
            share: of the budget.
            of: the candidates that it is about, or words for it.

        Raises:
            TrialFailedError: the program fails under one of them.
            UserError: the program ends too early to compare anything.
        """
        comparison = self._comparison(arms, decide, share)
        what = of if isinstance(of, str) else "; ".join(map(str, of))
        self._begin(
            "measuring what each setting adds to the others"
            if isinstance(of, str)
            else f"comparing {figures.count(len(of), 'setting')} inside one process"
        )
        self._say(
            f"comparing inside one process: {what} (at most {comparison.longest_steps} steps)"
        )
        for candidate in () if isinstance(of, str) else of:
            arm = self._arm(candidate.settings)
            arm.stage, arm.state = "inside one process", "running"
        self._changed()
        request = Request(comparison=comparison, seed=self._options.seed)
        done = self._trials.run(request, self._pace.limit_s(comparison.longest_steps))
        if done.ended and self._available is None:
            self._available = len(done.process.turns)
            return self._compare(arms, decide, share, of)
        return done, comparison

    def _comparison(
        self,
        arms: Sequence[Mapping[str, str]],
        decide: Literal["arms", "settings"] | None,
        share: float,
    ) -> Comparison:
        """As long as the budget and the program allow.

        Raises:
            UserError: the program ends too early to compare anything.
        """
        seconds = self._options.budget_seconds * share
        fewest = _fewest_rounds(len(arms))

        def sized(block_steps: int) -> Comparison:
            rounds = int(seconds / (self._pace.step_s * block_steps * len(arms))) // 2 * 2
            return Comparison(
                arms=tuple(map(dict, arms)),
                block_steps=block_steps,
                discard_steps=max(DISCARD_STEPS, block_steps // 4),
                warmup_steps=WARMUP_STEPS,
                rounds=min(max(rounds, fewest), MAXIMUM_ROUNDS),
                decide=decide,
            )

        made = sized(max(BLOCK_STEPS, round(BLOCK_S / self._pace.step_s)))
        if self._available is None or made.longest_steps <= self._available:
            return made
        made = sized(BLOCK_STEPS)
        usable = self._available - (made.longest_steps - len(arms) * made.rounds * BLOCK_STEPS)
        rounds = max(usable // (BLOCK_STEPS * len(arms)) // 2 * 2, fewest)
        block_steps = min(BLOCK_STEPS, usable // (rounds * len(arms)))
        if block_steps < MINIMUM_BLOCK_STEPS:
            needed = self._available - usable + fewest * MINIMUM_BLOCK_STEPS * len(arms)
            raise UserError(
                f"this program ends after {self._available} steps; to compare "
                f"{len(arms)} combinations of settings tune needs at least {needed}; with --knobs "
                "there are fewer"
            )
        return dataclasses.replace(made, rounds=rounds, block_steps=block_steps)

    # In fresh processes

    def _short_steps(self) -> int:
        """Of a run that only ranks."""
        shortest = max(SHORT_STEPS, round(SHORT_S / self._pace.step_s))
        return max(min(self._steps, shortest), MINIMUM_STEPS)

    def _left_for_cold_s(self) -> float:
        """Seconds of the budget beyond those that proof and claim need."""
        claim_s = 2 * USUAL_PAIRS * self._pace.seconds(self._steps)
        gradients_s = 2 * GRADIENT_SEEDS * self._pace.seconds(GRADIENT_STEPS + 1)
        return self._options.budget_seconds - self._trials.spent_s - claim_s - gradients_s

    def _cold(
        self, stack: dict[str, str], cold: Sequence[Candidate], again: bool = False
    ) -> dict[str, str]:
        """The stack with those cold settings that make it faster.

        Args:
            stack: the settings so far.
            cold: to be tried.
            again: they have been tried on another stack; now only what time is left is for them.
        """
        settings = dict(stack)
        for candidate in cold:
            if candidate.knob in settings:
                continue  # its first setting has won
            arm = self._arm(candidate.settings)
            steps = self._short_steps()
            pair_s = 2 * self._pace.seconds(steps)
            needed_s = statistics.RANKING_PAIRS * pair_s
            if knobs.get(candidate.knob).slow_start:
                needed_s += SLOW_START_S
            allowed_s = self._left_for_cold_s()
            if again and needed_s > allowed_s:
                continue
            if needed_s > max(allowed_s, COLD_SHARE * self._options.budget_seconds):
                arm.why = (
                    f"trying it takes about {needed_s:.0f} s, which wants a --budget of "
                    f"{math.ceil(needed_s / COLD_SHARE / 60)}m"
                )
                arm.stage = "fresh processes"
                self._say(f"{candidate} is not tried: {arm.why}")
                self._changed()
                continue
            arm.stage = "fresh processes"
            arm.state = "running"
            self._changed()
            tried = Pairs(
                dict(settings), settings | candidate.settings, in_relay=self._can_relay(settings)
            )
            self._say(f"{candidate} on top of {in_words(settings) or 'bare'}, in fresh processes")
            self._alternate(
                *(tried, functools.partial(self._is_ranked, pair_s), steps),
                *(f"trying {candidate} in fresh processes", statistics.RANKING_PAIRS),
            )
            if tried.interrupted:
                raise KeyboardInterrupt
            if tried.failure is not None:
                self._fail(arm, tried.failure)
                continue
            without_effect = _without_effect(tried)
            if candidate.knob in without_effect:
                self._has_no_effect(arm, without_effect[candidate.knob])
                continue
            arm.ratio = tried.ratio
            too_much = memory.refusal(
                tried.steps(tried.firsts), tried.steps(tried.seconds), self._options.memory
            )
            if too_much is not None:
                arm.state, arm.why = "left out", too_much
            elif statistics.is_mostly_faster(tried.log_ratios):
                arm.state = "won"
                settings |= candidate.settings
            else:
                arm.state = "no gain"
            faster = sum(log > 0 for log in tried.log_ratios)
            self._say(
                f"{candidate}: {arm.ratio}, faster in {faster} of {tried.count}"
                f"{'; ' * bool(arm.why)}{arm.why}"
            )
            self._changed()
        return settings

    def _settle(self, settings: dict[str, str], cold: Sequence[Candidate]) -> None:
        """Find the settings among the winners that are proven and faster; fill in the outcome.

        Args:
            settings: the winners.
            cold: settings that may have been of no use beside lower precision; without it they
                are tried again.
        """
        outcome = self._outcome
        for number in range(MAXIMUM_PROOFS):
            if not settings:
                return
            outcome.verdict = None
            made = Pairs({}, dict(settings), in_relay=self._can_relay(settings))
            self._begin(GRADIENTS_PHASE)
            refusal = self._prover.gradients_refusal(settings)
            passes: Callable[[Mapping[str, str]], bool] = self._prover.gradients_pass
            if refusal is None:
                self._say(
                    f"{in_words(settings)} against bare in fresh processes, {self._steps} steps "
                    "each"
                )
                self._alternate(
                    *(made, self._is_enough, self._steps, PROOF_PHASE, statistics.MINIMUM_PAIRS)
                )
                refusal, passes = self._refusal(made), functools.partial(self._prover.passes, made)
            if refusal is None:
                break
            self._say(f"{in_words(settings)}: {refusal}")
            outcome.why = f"{in_words(settings)} is not proven: {refusal}"
            if made.interrupted:
                outcome.interrupted = True
                return
            had_precision = "precision" in settings
            settings = self._without_culprit(settings, refusal, passes)
            is_last = number == MAXIMUM_PROOFS - 1
            if had_precision and "precision" not in settings and not is_last:
                useless = [c for c in cold if self._arm(c.settings).state == "no gain"]
                settings = self._cold(settings, useless, again=True)
        else:
            return
        outcome.interrupted = made.interrupted
        for name, why in _without_effect(made).items():
            self._leave_out(name, settings.pop(name), f"it has no effect: {why}")
        if not settings:
            outcome.why = f"{in_words(made.second)} has no effect on this program"
            return
        if not statistics.is_gain(made.ratio):
            outcome.why = (
                f"{in_words(settings)} gives {made.ratio} in fresh processes: "
                f"{figures.verdict(made.ratio)}"
            )
            return
        if made.whole_ratio <= 1:
            outcome.why = (
                f"{in_words(settings)} gives {made.ratio} but for a few steps, and "
                f"{made.whole_ratio:.2f}x with all of them: no gain"
            )
            return
        bare, plan = made.costs
        job_steps = outcome.job_steps
        if job_steps is not None and plan.job_s(job_steps) >= bare.job_s(job_steps):
            outcome.why = (
                f"{in_words(settings)} gives {made.ratio} a step, but the whole job has only "
                f"{job_steps}: {plan.job_s(job_steps):.1f} s against {bare.job_s(job_steps):.1f} s"
            )
            return
        self._accept(settings, made)

    def _refusal(self, made: Pairs) -> str | None:
        """Why this plan cannot be had, ``None``: it can."""
        refusal = self._prover.refusal(made)
        self._outcome.verdict = self._prover.verdict
        return refusal

    def _without_culprit(
        self,
        settings: Mapping[str, str],
        refusal: str,
        passes: Callable[[Mapping[str, str]], bool],
    ) -> dict[str, str]:
        """The settings with the culprit turned to its gentler setting, or off."""
        left = dict(settings)
        verdict = self._outcome.verdict
        if verdict is not None and verdict.undecided:
            found = _least_certain(settings)
        else:
            self._begin("looking for the setting that fails the proof")
            self._say("looking for the culprit")
            found = search.culprits(settings, passes)
        for name, setting in found.items():
            self._leave_out(name, setting, refusal)
            gentler = search.gentler(name, setting, self._offered.get(name))
            if gentler is None or self._has_no_gain({name: gentler}):
                del left[name]
            else:
                left[name] = gentler
                self._say(f"{name} is turned back to {gentler}")
        return left

    def _can_relay(self, settings: Mapping[str, str]) -> bool:
        """Whether two of these programs can be there at the same time.

        Ranks of a distributed job would ask for the same port, workers of a loader work on while
        their run waits, and of the memory of an accelerator no one knows how much is free.
        """
        import psutil

        process = self._first.process
        facts = (process.profile or {}).get("facts") or {}
        workers = any(loader["workers"] for loader in facts.get("loaders", ()))
        if workers or settings.get("loader") == "workers":
            return False
        peaks = [turn.peak_rss_bytes or 0 for turn in process.turns if turn.mark is None]
        return (
            process.header["world_size"] is None
            and not Case(process).on_accelerator
            and 3 * max(peaks, default=0) < psutil.virtual_memory().available
        )

    def _is_ranked(self, pair_s: float, made: Pairs) -> bool:
        """Whether a cold setting has been tried often enough, or time is over."""
        if statistics.is_ranked(made.log_ratios):
            return True
        return made.count >= statistics.RANKING_PAIRS and pair_s > self._left_for_cold_s()

    def _is_enough(self, made: Pairs) -> bool:
        """Whether the claim is narrow enough, or time is over."""
        if made.count < statistics.MINIMUM_PAIRS:
            return False
        pair_s = 2 * self._pace.seconds(self._steps)
        if self._trials.spent_s + pair_s > self._options.budget_seconds:
            return self._is_overtime_over(made)
        if not statistics.enough_pairs(made.log_ratios, MAXIMUM_PAIRS):
            return False
        if made.count >= MAXIMUM_PAIRS or self._prover.is_reordered(made):
            return True
        return not self._prover.judge(made).undecided

    def _is_overtime_over(self, made: Pairs) -> bool:
        """Whether there is no use in pairs beyond the budget. Where the losses decide nothing, as
        many are made as the next plan would need, which has less to bring."""
        is_decided = not self._prover.judge(made).undecided
        if is_decided or made.count >= MAXIMUM_PAIRS or self._prover.is_reordered(made):
            return True
        if made.overtime_from is None:
            made.overtime_from = made.count
            self._say(
                "time is over, and the losses decide nothing yet: at most "
                f"{statistics.MINIMUM_PAIRS} more pairs"
            )
        return made.count >= made.overtime_from + statistics.MINIMUM_PAIRS

    def _alternate(
        self,
        made: Pairs,
        is_enough: Callable[[Pairs], bool],
        steps: int,
        phase: str,
        expected: int,
    ) -> None:
        """Run pairs until there are enough.

        Args:
            made: to be added to.
            is_enough: asked before each pair.
            steps: of each run.
            phase: what the pairs are for, see ``Phase.what``.
            expected: how many pairs it should take, as far as is known before.
        """
        pair_s = 2 * self._pace.seconds(steps)

        def is_over(made: Pairs) -> bool:
            if is_enough(made):
                return True
            left = expected - made.count
            if left > 0:
                self._begin(phase, made.count + 1, expected, left * pair_s)
            else:
                self._begin(phase, made.count + 1)
            return False

        pairs.run(
            self._trials,
            made,
            pace=self._pace,
            steps=steps,
            seed=self._options.seed,
            is_enough=is_over,
            say=self._say,
        )
        for done in (*made.firsts, *made.seconds):
            self._outcome.inputs = _in_common(self._outcome.inputs, done.process.inputs)
            self._outcome.modules |= done.modules

    def _accept(self, settings: dict[str, str], made: Pairs) -> None:
        outcome, ratio = self._outcome, made.ratio
        verdict = outcome.verdict
        assert verdict is not None
        outcome.settings = settings
        outcome.pairs = made
        outcome.why = f"{in_words(settings)} gives {ratio}, and {verdict.why}"
        alone = {name: outcome.alone(name) for name in settings}
        bare, plan = made.costs
        outcome.evidence = Evidence(
            settings=dict(settings),
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            pairs=ratio.pairs,
            bare_step_ms=bare.step_ms,
            plan_step_ms=plan.step_ms,
            steps=verdict.steps,
            seeds=ratio.pairs if any(loss.yardstick == "seeds" for loss in verdict.losses) else 1,
            bare_repeats=verdict.bare_repeats is True,
            verdict=verdict.kind,
            in_process={name: r.value for name, r in alone.items() if r is not None},
            losses=verdict.losses,
            checks=verdict.checks,
        )

    # Arms

    def _arm(self, settings: Mapping[str, str]) -> Arm:
        return next(arm for arm in self._outcome.arms if arm.settings == settings)

    def _has_no_gain(self, settings: Mapping[str, str]) -> bool:
        return any(a.settings == settings and a.state == "no gain" for a in self._outcome.arms)

    def _fail(self, arm: Arm, why: str) -> None:
        arm.state, arm.why = "failed", why
        self._say(f"{in_words(arm.settings)} is out: {why}")
        self._changed()

    def _has_no_effect(self, arm: Arm, why: str) -> None:
        """Whatever its ratio says: that is noise."""
        arm.state, arm.why = "no gain", f"it has no effect: {why}"
        self._say(f"{in_words(arm.settings)}: {arm.why}")
        self._changed()

    def _leave_out(self, knob: str, setting: str, why: str) -> None:
        self._say(f"{knob}={setting} is left out: {why}")
        for arm in self._outcome.arms:
            if arm.settings == {knob: setting}:
                arm.state, arm.why = "left out", why
        self._changed()

    def _begin(
        self,
        what: str,
        pair: int | None = None,
        of_pairs: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Begin a phase, see ``Phase``; without ``seconds`` it may last as long as the budget."""
        ends_s = self._options.budget_seconds if seconds is None else self._trials.spent_s + seconds
        self._outcome.phase = Phase(what, pair, of_pairs, ends_s)
        self._changed()

    def _changed(self) -> None:
        phase = self._outcome.phase
        ends_s = self._options.budget_seconds if phase is None else phase.ends_s
        self._show(self._outcome, max(ends_s - self._trials.spent_s, 0.0))


def _in_common(
    one: tuple[str, ...] | None, other: tuple[str, ...] | None
) -> tuple[str, ...] | None:
    return None if one is None or other is None else signature.merged(one, other)


def _without_effect(made: Pairs) -> dict[str, str]:
    """Knobs of the second side that did nothing in any of its runs, with the reason."""
    found = [trial.reasons(done.process, "unused") for done in made.seconds]
    first = found[0] if found else {}
    return {name: why for name, why in first.items() if all(name in one for one in found)}


def _factors(of: Sequence[Candidate]) -> list[list[tuple[str, str]]]:
    """The settings, those together that exclude each other: of one knob, or of one claim."""
    factors: list[tuple[set[str], list[tuple[str, str]]]] = []
    for candidate in of:
        takes = {candidate.knob, *knobs.get(candidate.knob).claims}
        setting = (candidate.knob, candidate.setting)
        for taken, settings in factors:
            if taken & takes:
                taken |= takes
                settings.append(setting)
                break
        else:
            factors.append((takes, [setting]))
    return [settings for _, settings in factors]


def _fewest_rounds(arms: int) -> int:
    """An even number of rounds whose blocks are enough for an interval (``ratios.arm_ratios``)."""
    blocks = arms + 1 + MINIMUM_FREEDOM
    return 2 * math.ceil(blocks / arms / 2)


def _least_certain(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings that change most: other random numbers, or else all that do anything."""
    order: tuple[Exactness, ...] = ("reshuffled", "resampled", "reduced", "reordered", "bitwise")
    kinds = {name: knobs.get(name).exactness[setting] for name, setting in settings.items()}
    most = min(kinds.values(), key=order.index)
    return {name: setting for name, setting in settings.items() if kinds[name] == most}


def _arm_at_the_end(failure: TrialFailedError) -> int | None:
    """The arm whose turn it was when the process ended."""
    if failure.process is None:
        return None
    turns = [e.subject for e in failure.process.events if e.subject.startswith("arm ")]
    return int(turns[-1].removeprefix("arm ")) if turns else None
