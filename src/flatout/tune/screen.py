"""Screening: hot candidates are compared inside one process, which ranks them.

The program switches between combinations of settings every few steps, a factorial A/B test
(``design.py``), so that every step tells something about every candidate. The winners form a
stack. The stack is compared with copies that each lack one knob, and loses what it does not need.
Last, candidates whose part of the bare step was too small to tell anything get a second comparison
on top of the stack, where that part is larger.

Screening claims nothing: the claim comes from fresh processes (``prover.py``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

from flatout import knobs
from flatout.errors import UserError
from flatout.tune import candidates, design, figures, pairs, statistics, trial
from flatout.tune.bare import BareRun
from flatout.tune.candidates import Candidate
from flatout.tune.ledger import Ledger, Options, format_settings
from flatout.tune.stage import TuneStage
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire.ratios import (
    MINIMUM_DEGREES_OF_FREEDOM,
    Ratio,
    estimate_arm_ratios,
    estimate_setting_ratios,
)
from flatout.wire.record import WARMUP_STEPS
from flatout.wire.request import Comparison, Request

BLOCK_STEPS = 4
"""Steps of a block, unless it would be shorter than ``BLOCK_S``."""

MINIMUM_BLOCK_STEPS = 3
"""Fewest steps of a block, for a program that ends too early for ``BLOCK_STEPS``."""

DISCARD_STEPS = 1
"""Fewest steps at the start of a block that are not timed."""

BLOCK_S = 0.02
"""Seconds that a block lasts at least; a quarter of it is not timed. In a shorter block, what the
switch leaves behind in caches would count."""

MAXIMUM_ROUNDS = 40
"""Most blocks of one arm in a comparison."""

COMPARISON_SHARE = 0.15
"""Share of the budget that all comparisons inside one process may take."""

MAXIMUM_CANDIDATES = 11
"""Most candidates that are compared in one process: they need 24 arms (``design.build_stacks``)."""

MANY_ARMS = 16
"""A program is short if it has too few steps for two comparisons of this many arms."""

FEW_CANDIDATES = 3
"""Most candidates that are compared at a time in a short program, see ``MANY_ARMS``."""

StopRule = Literal["arms", "settings"] | None
"""What ends a comparison early, see ``Comparison.decide``."""


class Screening(TuneStage):
    """The screening of one tune."""

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        super().__init__(trials, ledger, bare, options)
        self._job_steps = bare.job_steps

    def find_stack(self, hot: Sequence[Candidate]) -> dict[str, str]:
        """Find the hot settings that make the program faster together.

        Args:
            hot: the candidates, entered in the ledger.

        Raises:
            UserError: the program ends too early to compare anything, or fails when it runs again.
        """
        return self._look_again(self._reduce(self._rank(hot)), hot)

    def _rank(self, hot: Sequence[Candidate]) -> dict[str, str]:
        """Find the best setting of each hot knob that is faster, the fastest knob first.

        The candidates are compared in combinations, which shows what each gains among the others.
        If the program crashes under a combination, each candidate is compared alone, to find which
        causes it.
        """
        try:
            self._compare_combined(hot)
        except TrialFailedError as failure:
            self._ledger.say(
                f"the program fails under a combination of settings, so each is tried alone: "
                f"{failure}"
            )
            self._compare_alone(hot)
        best: dict[str, tuple[float, str]] = {}
        for candidate in hot:
            arm = self._ledger.find(candidate.settings)
            if arm.ratio is None:
                continue
            self._ledger.say(f"{candidate}: {arm.ratio} inside one process")
            if statistics.pick_winners({str(candidate): arm.ratio}):
                self._ledger.accept(candidate.settings)
                setting = (arm.ratio.value, candidate.setting)
                best[candidate.knob] = max(best.get(candidate.knob, (0.0, "")), setting)
            else:
                self._ledger.reject(candidate.settings, arm.why)
        ordered = sorted(best.items(), key=lambda item: -item[1][0])
        return {knob: setting for knob, (_, setting) in ordered}

    def _compare_combined(self, hot: Sequence[Candidate]) -> None:
        """Measure each candidate among the others; those that fail are dropped.

        Raises:
            TrialFailedError: the program failed under a combination of several.
        """
        groups = self._divide(hot)
        for group in groups:
            stacks = design.build_stacks(group_exclusive(group))
            share = COMPARISON_SHARE / len(groups)
            done, comparison = self._compare(stacks, "settings", share, group)
            failures = trial.collect_reasons(done.process, "failed")
            applied = [
                {knob: setting for knob, setting in stack.items() if knob not in failures}
                for stack in stacks
            ]
            ratios = estimate_setting_ratios(
                statistics.complete_blocks(done.process.loop_steps, comparison), applied
            )
            skips = trial.collect_reasons(done.process, "skipped")
            unused = trial.collect_reasons(done.process, "unused")
            for candidate in group:
                ratio = ratios.get((candidate.knob, candidate.setting))
                if candidate.knob in failures:
                    self._ledger.fail(candidate.settings, failures[candidate.knob])
                elif candidate.knob in unused:
                    self._ledger.reject_without_effect(candidate.settings, unused[candidate.knob])
                elif ratio is None:
                    why = "the program has too few steps to tell it from the others"
                    self._ledger.skip(candidate.settings, "inside one process", why)
                else:
                    self._ledger.note_ratio(candidate, ratio, skips.get(candidate.knob, ""))

    def _compare_alone(self, hot: Sequence[Candidate]) -> None:
        """Measure each candidate alone, if it has not been measured; those that fail are dropped.

        Raises:
            UserError: the program fails without any of them.
        """
        for group in self._divide(hot):
            left = [c for c in group if self._ledger.find(c.settings).ratio is None]
            while left:
                arms = ({}, *(candidate.settings for candidate in left))
                try:
                    done, comparison = self._compare(arms, "arms", COMPARISON_SHARE, left)
                except TrialFailedError as failure:
                    last_arm = _find_last_arm(failure)
                    if not last_arm:
                        message = "the program fails when it runs again"
                        raise pairs.to_user_error(message, failure) from failure
                    culprit = left.pop(last_arm - 1)
                    self._ledger.fail(culprit.settings, f"the program fails under it: {failure}")
                    continue
                self._note_alone(left, done, comparison)
                break

    def _note_alone(
        self, compared: Sequence[Candidate], done: Trial, comparison: Comparison
    ) -> None:
        """Enter what came of a comparison in which each candidate was an arm of its own."""
        failures = trial.collect_reasons(done.process, "skipped", "failed")
        unused = trial.collect_reasons(done.process, "unused")
        ratios = estimate_arm_ratios(
            statistics.complete_blocks(done.process.loop_steps, comparison)
        )
        for number, candidate in enumerate(compared, 1):
            if f"arm {number}" in failures:
                self._ledger.fail(candidate.settings, failures[f"arm {number}"])
            elif candidate.knob in unused:
                self._ledger.reject_without_effect(candidate.settings, unused[candidate.knob])
            else:
                self._ledger.note_ratio(candidate, ratios.get(number))

    def _reduce(self, winners: dict[str, str]) -> dict[str, str]:
        """Remove from the stack of winners what gains nothing on top of the others."""
        if len(winners) < 2 or self._job_steps is not None:
            return winners
        stacks = (
            winners,
            *({k: s for k, s in winners.items() if k != left_out} for left_out in winners),
        )
        found = self._compare_with_first(stacks, "arms", "the stack, and the stack less each knob")
        stack_less_knob = {knob: found[n] for n, knob in enumerate(winners, 1) if n in found}
        for knob, ratio in stack_less_knob.items():
            gain = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.pairs)
            self._ledger.note_on_top(knob, gain)
        kept = dict(winners)
        for knob in statistics.find_redundant(stack_less_knob)[: len(winners) - 1]:
            why = "the other settings are as fast without it"
            self._ledger.leave_out({knob: kept.pop(knob)}, why)
        return kept

    def _look_again(self, stack: dict[str, str], hot: Sequence[Candidate]) -> dict[str, str]:
        """Add to the stack what gains on it although its gain on bare was too small to see.

        Args:
            stack: the winners.
            hot: all candidates that were compared.
        """
        arms = {candidate: self._ledger.find(candidate.settings) for candidate in hot}
        ratios = {c: arm.ratio for c, arm in arms.items() if arm.state != "left out"}
        again = candidates.find_second_looks(ratios, stack)
        if not again or self._job_steps is not None:
            return stack
        stacks = (stack, *(stack | {knob: setting} for knob, setting in again.items()))
        found = self._compare_with_first(
            stacks, None, f"once more {format_settings(again)}, on top of the stack"
        )
        gains = {knob: found[n] for n, knob in enumerate(again, 1) if n in found}
        for knob, gain in gains.items():
            self._ledger.note_on_top(knob, gain)
        grown = dict(stack)
        for knob in statistics.pick_winners(gains):
            grown[knob] = again[knob]
            self._ledger.accept({knob: again[knob]}, f"{gains[knob]} on top of the others")
        return grown

    def _compare_with_first(
        self, arms: Sequence[Mapping[str, str]], decide: StopRule, what: str
    ) -> dict[int, Ratio]:
        """Measure arms against the first of them, by their numbers; none if the program fails."""
        try:
            done, comparison = self._compare(arms, decide, COMPARISON_SHARE / 2, what)
        except TrialFailedError as failure:
            self._ledger.say(f"{what}: not measured, the program fails: {failure}")
            return {}
        return estimate_arm_ratios(statistics.complete_blocks(done.process.loop_steps, comparison))

    def _divide(self, hot: Sequence[Candidate]) -> list[list[Candidate]]:
        """Divide the candidates into as few groups as a program of this length can compare."""
        if not hot:
            return []
        size = MAXIMUM_CANDIDATES
        if self._job_steps is not None:
            blocks = (self._job_steps - WARMUP_STEPS) // MINIMUM_BLOCK_STEPS
            if blocks < 2 * count_fewest_rounds(MANY_ARMS) * MANY_ARMS:
                size = FEW_CANDIDATES
        count = -(-len(hot) // size)
        return [list(hot[part::count]) for part in range(count)]

    def _compare(
        self,
        arms: Sequence[Mapping[str, str]],
        decide: StopRule,
        share: float,
        compared: Sequence[Candidate] | str,
    ) -> tuple[Trial, Comparison]:
        """Let arms alternate inside one process.

        Args:
            arms: the arms; the others are compared with the first.
            decide: what ends the comparison early, see ``Comparison``.
            share: share of the budget that it may take.
            compared: the candidates that it is about, or words for it.

        Raises:
            TrialFailedError: the program fails under one of the arms.
            UserError: the program ends too early to compare anything.
        """
        comparison = size_comparison(
            arms,
            decide,
            limit_s=self._options.budget_seconds * share,
            step_s=self._bare.pace.step_s,
            job_steps=self._job_steps,
        )
        what = compared if isinstance(compared, str) else "; ".join(map(str, compared))
        self._ledger.say(
            f"comparing inside one process: {what} (at most {comparison.longest_steps} steps)"
        )
        self._ledger.begin(
            f"measuring {compared}"
            if isinstance(compared, str)
            else f"comparing {figures.count(len(compared), 'setting')} inside one process"
        )
        self._ledger.start(() if isinstance(compared, str) else compared, "inside one process")
        request = Request(comparison=comparison, seed=self._options.seed)
        done = self._trials.run(request, self._bare.pace.limit_s(comparison.longest_steps))
        if done.ended and self._job_steps is None:
            self._job_steps = len(done.process.loop_steps)
            return self._compare(arms, decide, share, compared)
        return done, comparison


def size_comparison(
    arms: Sequence[Mapping[str, str]],
    decide: StopRule,
    *,
    limit_s: float,
    step_s: float,
    job_steps: int | None,
) -> Comparison:
    """Make a comparison as long as its time and the program allow.

    Args:
        arms: its arms.
        decide: what ends it early, see ``Comparison``.
        limit_s: seconds that it may take.
        step_s: seconds of a step of the bare program.
        job_steps: length of the job in steps, ``None``: longer than was looked at.

    Raises:
        UserError: the program ends too early to compare anything.
    """
    fewest = count_fewest_rounds(len(arms))

    def fill_time(block_steps: int) -> Comparison:
        rounds = int(limit_s / (step_s * block_steps * len(arms))) // 2 * 2
        return Comparison(
            arms=tuple(map(dict, arms)),
            block_steps=block_steps,
            discard_steps=max(DISCARD_STEPS, block_steps // 4),
            warmup_steps=WARMUP_STEPS,
            rounds=min(max(rounds, fewest), MAXIMUM_ROUNDS),
            decide=decide,
        )

    comparison = fill_time(max(BLOCK_STEPS, round(BLOCK_S / step_s)))
    if job_steps is None or comparison.longest_steps <= job_steps:
        return comparison
    comparison = fill_time(BLOCK_STEPS)
    in_rounds = len(arms) * comparison.rounds * BLOCK_STEPS
    usable = job_steps - (comparison.longest_steps - in_rounds)
    rounds = max(usable // (BLOCK_STEPS * len(arms)) // 2 * 2, fewest)
    block_steps = min(BLOCK_STEPS, usable // (rounds * len(arms)))
    if block_steps < MINIMUM_BLOCK_STEPS:
        needed = job_steps - usable + fewest * MINIMUM_BLOCK_STEPS * len(arms)
        raise UserError(
            f"this program ends after {job_steps} steps; to compare {len(arms)} combinations of "
            f"settings tune needs at least {needed}; try fewer knobs with --knobs"
        )
    return dataclasses.replace(comparison, rounds=rounds, block_steps=block_steps)


def count_fewest_rounds(arms: int) -> int:
    """The least even number of rounds whose blocks give an interval (``ratios.arm_ratios``)."""
    blocks = arms + 1 + MINIMUM_DEGREES_OF_FREEDOM
    return 2 * math.ceil(blocks / arms / 2)


def group_exclusive(hot: Sequence[Candidate]) -> list[list[tuple[str, str]]]:
    """Group settings that exclude each other: those of one knob, or of knobs that claim the same.

    Each group is one factor of the factorial design.
    """
    factors: list[tuple[set[str], list[tuple[str, str]]]] = []
    for candidate in hot:
        claims = {candidate.knob, *knobs.get(candidate.knob).claims}
        setting = (candidate.knob, candidate.setting)
        for claimed, settings in factors:
            if claimed & claims:
                claimed |= claims
                settings.append(setting)
                break
        else:
            factors.append((claims, [setting]))
    return [settings for _, settings in factors]


def _find_last_arm(failure: TrialFailedError) -> int | None:
    """The number of the arm that was applied when the process ended, ``None``: not known."""
    if failure.process is None:
        return None
    arms = [e.subject for e in failure.process.events if e.subject.startswith("arm ")]
    return int(arms[-1].removeprefix("arm ")) if arms else None
