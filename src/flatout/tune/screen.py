"""Ranks the hot candidates inside one process.

A candidate is a setting that is worth a trial. It is hot if it can be turned on and off between two
steps of a running program.

The program switches between combinations of settings (*arms*). It makes a few steps under one arm
(a *block*), then a block under the next arm; a *round* has one block of each arm. This is a
factorial A/B test (``design.py``), so every step tells something about every candidate. A few
settings are not combined with others, but have an arm of their own (``Knob.is_compared_alone``).

The winners form the *stack*, the settings that are applied together. The stack is then compared
with copies that each lack one knob, and the settings that it does not need are removed. Last, some
candidates are compared once more, on top of the stack: those that affect so small a part of the
bare step that no gain could be measured. The same part is a larger share of the stack's step.

Screening claims no speedup: claims come from fresh processes (``prover.py``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from flatout import knobs
from flatout.tune import candidates, design, formatting, pairs, prover, quiet, statistics, trial
from flatout.tune.bare import BareRun, find_outside_steps_s
from flatout.tune.candidates import Candidate
from flatout.tune.ledger import Ledger, Options, format_settings
from flatout.tune.pairs import Pace
from flatout.tune.stage import TuneStage
from flatout.tune.trial import Trial, TrialFailedError, Trials
from flatout.wire.ratios import (
    MINIMUM_DEGREES_OF_FREEDOM,
    Block,
    Ratio,
    estimate_arm_ratios,
    estimate_setting_ratios,
)
from flatout.wire.record import WARMUP_STEPS
from flatout.wire.request import Comparison, Request

BLOCK_STEPS = 4
"""Number of steps of a block, unless the block would be shorter than ``BLOCK_S``."""

SLOW_STEP_S = 0.25
"""A step is slow if it takes at least this many seconds. A block of slow steps has only
``SLOW_BLOCK_STEPS`` steps: after a switch, one slow step is enough to fill the caches anew."""

SLOW_BLOCK_STEPS = 2
"""Number of steps of a block of slow steps; the first is not timed."""

PROMISING_BOUND = 1.1
"""A setting that there is no time to compare still joins the stack if it could make the program at
least this many times as fast. The proof then measures it together with the others. The same holds
for a setting whose ratio is at least this, but uncertain because steps are slow and few."""

SLOW_FIRST_STEPS = 1
"""Number of steps that an arm makes before the rounds begin, if steps are slow and the arm has a
setting that no arm before it has. These steps keep allocation and compilation out of the rounds."""

MINIMUM_BLOCK_STEPS = 3
"""Minimum number of steps of a block, for a program that ends too early for ``BLOCK_STEPS``."""

DISCARD_STEPS = 1
"""Minimum number of steps at the start of a block that are not timed. If blocks are whole cycles of
the program (``cycles.py``), all of their steps are timed."""

BLOCK_S = 0.02
"""Minimum duration of a block, in seconds. The first quarter of such a block is not timed. In a
shorter block, the state of the caches after the switch would affect the times."""

MAXIMUM_ROUNDS = 40
"""Maximum number of blocks of one arm in a comparison."""

COMPARISON_SHARE = 0.15
"""Share of the budget that the factorial comparison of all candidates may take. If the program
crashes in this comparison, it is repeated with one arm for each candidate, and once more without
the culprit after each further crash; each of these comparisons may take as much. A comparison of
stacks may take half as much; there are up to three."""

MAXIMUM_CANDIDATES = 11
"""Maximum number of candidates that are compared in one process; they need 24 arms
(``design.build_arms``)."""

MANY_ARMS = 16
"""The number of arms that seven candidates need. A job is short if it has too few steps for the
minimum number of rounds (``count_fewest_rounds``) of this many arms. The candidates of a short job
are compared in groups of at most ``FEW_CANDIDATES``, each group in its own run."""

FEW_CANDIDATES = 3
"""Maximum number of candidates in a group of a short job, see ``MANY_ARMS``."""

TOO_FEW_STEPS = "the program has too few steps to measure the effect of this setting"
"""The reason that is given if a comparison gives no ratio for a candidate."""

LEFT_TO_THE_PROOF = "too few steps to be sure; the proof measures it"
"""The remark on a setting that joins the stack although its gain is not certain, because the steps
are slow and few were compared."""

StopRule = Literal["arms", "settings"] | None
"""The rule that ends a comparison early, see ``Comparison.decide``."""


class _JobEndedError(Exception):
    """Raised if the whole job turns out to end before a comparison has enough blocks.

    Args:
        steps: the number of steps of the job.
    """

    def __init__(self, steps: int) -> None:
        super().__init__(f"the job ends after {steps} steps")
        self.steps = steps


class TooFewStepsError(Exception):
    """Raised with the reason if the program ends too early to compare anything in one process."""


class NoTimeError(Exception):
    """Raised if the budget has no time for a comparison.

    Args:
        needed_s: the time that the comparison would take, in seconds.
    """

    def __init__(self, needed_s: float) -> None:
        super().__init__(f"it takes about {formatting.duration(needed_s)}")
        self.needed_s = needed_s


class Screening(TuneStage):
    """The screening of one tune.

    Attributes:
        not_compared: the candidates that could not be compared in one process, because the program
            ends too early. They are to be compared in fresh processes.
    """

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        super().__init__(trials, ledger, bare, options)
        self._job_steps = bare.job_steps
        self.not_compared: list[Candidate] = []
        self._no_time: list[Candidate] = []
        self._switching_s = 0.0

    @property
    def _has_job_ended(self) -> bool:
        """Whether the job has come to its end within the first run or a comparison.

        A job that ends so early has too few steps to compare stacks, whose ratios are close to 1.
        """
        return self._job_steps is not None

    def find_stack(self, hot: Sequence[Candidate]) -> dict[str, str]:
        """Find the hot settings that make the program faster together.

        Args:
            hot: the candidates; each must already be entered in the ledger.

        Raises:
            UserError: the program fails when it runs again.
        """
        return self._look_again(self._reduce(self._rank(hot)), hot)

    def _rank(self, hot: Sequence[Candidate]) -> dict[str, str]:
        """Find the hot knobs that speed up the step, and the best setting of each.

        The knob with the largest gain comes first. The candidates are compared in combinations,
        which shows what each gains among the others. If the program crashes under a combination,
        each candidate gets an arm of its own, to find the one that causes the crash.
        """
        try:
            self._compare_groups(hot, self._compare_combined)
        except TrialFailedError as failure:
            self._ledger.print_line(
                f"a comparison of several settings at once has failed, so each setting gets "
                f"blocks of its own: {failure}"
            )
            self._compare_groups(hot, lambda group, _: self._compare_alone(group))
        best: dict[str, tuple[float, Candidate]] = {}
        for candidate in hot:
            entry = self._ledger.find(candidate.settings)
            if entry.ratio is None:
                continue
            self._ledger.print_line(f"{candidate}: {entry.ratio} inside one process")
            is_winner = bool(statistics.pick_winners({str(candidate): entry.ratio}))
            if is_winner or self._is_open(entry.ratio):
                why = "" if is_winner else LEFT_TO_THE_PROOF
                self._ledger.accept(candidate.settings, why)
                faster = (entry.ratio.value, candidate)
                if candidate.knob in best:
                    faster, slower = sorted((faster, best[candidate.knob]), key=lambda one: -one[0])
                    self._ledger.leave_out(slower[1].settings, f"{faster[1]} gains more")
                best[candidate.knob] = faster
            else:
                self._ledger.reject(candidate.settings, entry.why)
        ordered = sorted(best.items(), key=lambda item: -item[1][0])
        stack = {knob: candidate.setting for knob, (_, candidate) in ordered}
        return self._add_promising(stack, hot)

    def _is_open(self, ratio: Ratio) -> bool:
        """Return whether a setting may gain much, but slow steps were too few to tell."""
        is_slow = self._bare.pace.step_s >= SLOW_STEP_S
        return is_slow and ratio.value >= PROMISING_BOUND and ratio.high > 1 > ratio.low

    def _add_promising(self, stack: dict[str, str], hot: Sequence[Candidate]) -> dict[str, str]:
        """Add the settings that may gain much, but that there was no time to compare.

        Of settings that exclude each other, only the one with the largest possible gain is added;
        none is added if the stack already has one of them.
        """
        left_out = [one for one in hot if one in self._no_time]
        promising = [one for one in left_out if _promise(one) >= PROMISING_BOUND]
        promising.sort(key=lambda one: -_promise(one))
        grown = dict(stack)
        for factor in group_exclusive(hot):
            if any(grown.get(knob) == setting for knob, setting in factor):
                continue
            best = next((one for one in promising if (one.knob, one.setting) in factor), None)
            if best is not None:
                grown |= best.settings
                self._ledger.accept(best.settings, "there was no time to compare it")
                self._ledger.print_line(f"{best} joins the plan unmeasured; the proof measures it")
        return grown

    def _compare_groups(
        self, hot: Sequence[Candidate], compare: Callable[[list[Candidate], int], None]
    ) -> None:
        """Compare candidates in as few groups as possible.

        If a comparison shows that the job is too short for it, the candidates of this group and of
        the groups after it are divided again.

        Args:
            hot: the candidates.
            compare: compares one group, given its candidates and the number of groups.
        """
        groups = self._divide(hot)
        count = len(groups)
        while groups:
            try:
                compare(groups[0], count)
            except _JobEndedError:
                groups = self._divide([candidate for group in groups for candidate in group])
                count = len(groups)
            except TooFewStepsError as reason:
                self._ledger.print_line(f"{reason}, so settings are compared in fresh processes")
                left = [candidate for group in groups for candidate in group]
                self.not_compared = [
                    candidate
                    for candidate in hot
                    if candidate in left and not self._ledger.is_settled(candidate.settings)
                ]
                return
            except NoTimeError as reason:
                groups = self._compare_fewer(groups, reason)
                count = len(groups)
            else:
                groups = groups[1:]

    def _compare_fewer(
        self, groups: Sequence[Sequence[Candidate]], reason: NoTimeError
    ) -> list[list[Candidate]]:
        """Leave out the unsettled candidate that promises the smallest gain, and divide the others
        again."""
        left = [
            candidate
            for group in groups
            for candidate in group
            if not self._ledger.is_settled(candidate.settings)
        ]
        if not left:
            return []
        least = min(reversed(left), key=_promise)
        self._no_time.append(least)
        budget_s = self._ledger.budget_s + reason.needed_s
        self._ledger.skip(
            least.settings,
            "inside one process",
            f"comparing it with the others needs a --budget of about {math.ceil(budget_s / 60)}m",
        )
        return self._divide([candidate for candidate in left if candidate is not least])

    def _compare_combined(self, group: Sequence[Candidate], groups: int) -> None:
        """Measure each candidate of a group among the others, and drop candidates that fail.

        Args:
            group: the candidates.
            groups: the number of groups; each may take an equal part of the time.

        Raises:
            NoTimeError, _JobEndedError: see ``_compare``.
            TrialFailedError: the program failed under a combination of settings.
        """
        arms = build_arms(group)
        done, comparison = self._compare(arms, "settings", COMPARISON_SHARE / groups, group)
        failures = trial.collect_reasons(done.process, "failed")
        applied = [
            {knob: setting for knob, setting in arm.items() if f"{knob}={setting}" not in failures}
            for arm in arms
        ]
        ratios = estimate_setting_ratios(
            quiet.find_counting_blocks(done.process, comparison), applied
        )
        skips = trial.collect_reasons(done.process, "skipped")
        unused = trial.collect_reasons(done.process, "unused")
        for candidate in group:
            ratio = ratios.get((candidate.knob, candidate.setting))
            if str(candidate) in failures:
                self._ledger.fail(candidate.settings, failures[str(candidate)])
            elif candidate.knob in unused:
                self._ledger.reject_without_effect(candidate.settings, unused[candidate.knob])
            else:
                self._note_or_skip(
                    candidate, ratio, done, comparison, skips.get(candidate.knob, "")
                )

    def _compare_alone(self, group: Sequence[Candidate]) -> None:
        """Measure each unsettled candidate of a group alone, and drop candidates that fail.

        Raises:
            NoTimeError, _JobEndedError: see ``_compare``.
            UserError: the program fails without any settings.
        """
        left = [c for c in group if not self._ledger.is_settled(c.settings)]
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
                if failure.is_due_to_others:
                    self._ledger.skip(culprit.settings, "inside one process", str(failure))
                else:
                    self._ledger.fail(culprit.settings, f"the program fails under it: {failure}")
                continue
            self._note_alone(left, done, comparison)
            break

    def _note_alone(
        self, compared: Sequence[Candidate], done: Trial, comparison: Comparison
    ) -> None:
        """Enter the results of a comparison in which each candidate was an arm of its own."""
        failures = trial.collect_reasons(done.process, "skipped", "failed")
        unused = trial.collect_reasons(done.process, "unused")
        ratios = estimate_arm_ratios(quiet.find_counting_blocks(done.process, comparison))
        for number, candidate in enumerate(compared, 1):
            if f"arm {number}" in failures:
                self._ledger.fail(candidate.settings, failures[f"arm {number}"])
            elif candidate.knob in unused:
                self._ledger.reject_without_effect(candidate.settings, unused[candidate.knob])
            else:
                self._note_or_skip(candidate, ratios.get(number), done, comparison)

    def _note_or_skip(
        self,
        candidate: Candidate,
        ratio: Ratio | None,
        done: Trial,
        comparison: Comparison,
        remark: str = "",
    ) -> None:
        """Enter a candidate's ratio with a remark, or the reason why there is no ratio."""
        why = quiet.why_not_compared(done.process, comparison, candidate.knob)
        if ratio is not None and why is None:
            self._ledger.note_ratio(candidate, ratio, remark)
        else:
            self._ledger.skip(candidate.settings, "inside one process", why or TOO_FEW_STEPS)

    def _reduce(self, winners: dict[str, str]) -> dict[str, str]:
        """Remove from the stack of winners the settings that gain nothing on top of the others."""
        if len(winners) < 2 or self._has_job_ended:
            return winners
        found = self._compare_with_first(
            (winners, *(_remove(winners, [knob]) for knob in winners)),
            "arms",
            "the chosen settings, and the same without each knob in turn",
        )
        stack_less_knob = {knob: found[n] for n, knob in enumerate(winners, 1) if n in found}
        for knob, ratio in stack_less_knob.items():
            gain = Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low, ratio.pairs)
            self._ledger.note_on_top(knob, winners[knob], gain)
        redundant = statistics.find_redundant(stack_less_knob)[: len(winners) - 1]
        for knob in self._find_removable(winners, redundant):
            why = "the other settings are as fast without it"
            self._ledger.leave_out({knob: winners[knob]}, why)
            winners = _remove(winners, [knob])
        return winners

    def _find_removable(self, winners: dict[str, str], redundant: list[str]) -> list[str]:
        """Find the redundant knobs that can be removed together without making the stack slower.

        If two knobs speed up the same work, the stack can do without either one, but not without
        both. Therefore the stack is also compared with copies that lack the first two redundant
        knobs, the first three, and so on. The knobs that a copy lacks can be removed if neither
        this copy nor a copy before it is slower than the stack.

        Args:
            winners: the stack.
            redundant: the knobs each of which the stack can do without if all others stay, in the
                order in which to remove them.
        """
        if len(redundant) < 2:
            return redundant
        prefixes = [redundant[:count] for count in range(1, len(redundant) + 1)]
        found = self._compare_with_first(
            (winners, *(_remove(winners, prefix) for prefix in prefixes[1:])),
            "arms",
            f"the chosen settings, and the same without several of {', '.join(redundant)}",
        )
        removable = prefixes[0]
        for number, prefix in enumerate(prefixes[1:], 1):
            if number not in found or not statistics.find_redundant({number: found[number]}):
                break
            removable = prefix
        return removable

    def _look_again(self, stack: dict[str, str], hot: Sequence[Candidate]) -> dict[str, str]:
        """Add settings that speed up the stack although their gain on bare was too small to
        measure.

        Args:
            stack: the winners.
            hot: all candidates that were compared.
        """
        entries = {candidate: self._ledger.find(candidate.settings) for candidate in hot}
        ratios = {c: entry.ratio for c, entry in entries.items() if entry.state != "left out"}
        again = candidates.find_second_looks(ratios, stack)
        if not again or self._has_job_ended:
            return stack
        arms = (stack, *(stack | {knob: setting} for knob, setting in again.items()))
        found = self._compare_with_first(
            arms, None, f"{format_settings(again)} once more, on top of the chosen settings"
        )
        gains = {knob: found[n] for n, knob in enumerate(again, 1) if n in found}
        for knob, gain in gains.items():
            self._ledger.note_on_top(knob, again[knob], gain)
        grown = dict(stack)
        for knob in statistics.pick_winners(gains):
            grown[knob] = again[knob]
            self._ledger.accept({knob: again[knob]}, f"{gains[knob]} on top of the others")
        return grown

    def _compare_with_first(
        self, arms: Sequence[Mapping[str, str]], stop_rule: StopRule, what: str
    ) -> dict[int, Ratio]:
        """Compare the first arm with each of the others.

        Args:
            arms: the arms.
            stop_rule: the rule that ends the comparison early.
            what: a description of the arms for the progress line.

        Returns a map from the number of each other arm to its ratio: the step time of the first arm
        divided by the step time of this arm. The map is empty if the program fails, if the job ends
        before there are enough blocks, or if the budget is too short.
        """
        try:
            done, comparison = self._compare(arms, stop_rule, COMPARISON_SHARE / 2, what)
        except TrialFailedError as failure:
            self._ledger.print_line(f"{what}: not measured: {failure}")
            return {}
        except _JobEndedError as short:
            self._ledger.print_line(
                f"{what}: not measured, because the program ends after {short.steps} steps"
            )
            return {}
        except NoTimeError as reason:
            self._ledger.print_line(
                f"{what}: not measured, because the budget is too short: {reason}"
            )
            return {}
        return estimate_arm_ratios(quiet.find_counting_blocks(done.process, comparison))

    def _divide(self, hot: Sequence[Candidate]) -> list[list[Candidate]]:
        """Divide the candidates into as few groups as a program of this length can compare."""
        if not hot:
            return []
        size = MAXIMUM_CANDIDATES
        if self._job_steps is not None:
            cycle_steps = self._bare.pace.cycle_steps  # more than 1: blocks are whole cycles
            shortest = cycle_steps if cycle_steps > 1 else 2 * MINIMUM_BLOCK_STEPS
            blocks = (self._job_steps - WARMUP_STEPS) // shortest
            if blocks < count_fewest_rounds(MANY_ARMS) * MANY_ARMS:
                size = FEW_CANDIDATES
        count = -(-len(hot) // size)
        kinds = sorted(hot, key=lambda one: knobs.get(one.knob).is_compared_alone)
        bounds = [len(kinds) * part // count for part in range(count + 1)]
        return [kinds[first:end] for first, end in itertools.pairwise(bounds)]

    def _compare(
        self,
        arms: Sequence[Mapping[str, str]],
        stop_rule: StopRule,
        share: float,
        compared: Sequence[Candidate] | str,
    ) -> tuple[Trial, Comparison]:
        """Compare arms that alternate inside one process.

        Args:
            arms: the arms; each of the others is compared with the first.
            stop_rule: the rule that ends the comparison early.
            share: the share of the budget that the comparison may take.
            compared: the candidates, or a description of the arms for the progress line.

        Raises:
            NoTimeError: the comparison would take the time that the proof needs.
            _JobEndedError: the job has ended in this comparison, before there were enough blocks.
            TrialFailedError: the program fails under one of the arms.
            TooFewStepsError: the program ends too early to compare anything.
        """
        # Comparisons with the stop rule "settings" come first, and find the plan. So they need only
        # leave time for the shortest proof; other comparisons leave time for the planned proof.
        estimate_s = prover.estimate_least_s if stop_rule == "settings" else prover.estimate_s
        proof_s = estimate_s(self._bare)
        spare_s = self._ledger.left_s - proof_s
        comparison = size_comparison(
            arms,
            stop_rule,
            limit_s=min(self._ledger.budget_s * share, spare_s - self._bare.pace.outside_steps_s),
            pace=self._bare.pace,
            job_steps=self._job_steps,
        )
        needed_s = self._bare.pace.seconds(comparison.longest_steps) + self._switching_s
        if not self._ledger.has_time_for(needed_s + proof_s):
            raise NoTimeError(needed_s)
        what = compared if isinstance(compared, str) else "; ".join(map(str, compared))
        self._ledger.print_line(
            f"comparing inside one process: {what} (at most {comparison.longest_steps} steps)"
        )
        self._ledger.begin(
            f"measuring {compared}"
            if isinstance(compared, str)
            else f"comparing {formatting.count(len(compared), 'setting')} inside one process"
        )
        self._ledger.start(() if isinstance(compared, str) else compared, "inside one process")
        request = Request(comparison=comparison, seed=self._options.seed)
        done = self._trials.run(request, self._bare.pace.limit_s(comparison.longest_steps))
        self._learn_pace(done)
        if done.ended and self._job_steps is None:
            self._job_steps = len(done.process.loop_steps)
            if not _suffices(quiet.find_counting_blocks(done.process, comparison), comparison):
                raise _JobEndedError(self._job_steps)
        return done, comparison

    def _learn_pace(self, done: Trial) -> None:
        """Learn from a comparison how long the program takes to start, and how long it takes to
        apply and undo the settings of the arms."""
        process = done.process
        if done.ended or process.end is None:
            return
        self._bare.pace.learn(find_outside_steps_s(done))
        first_s = process.loop_steps[0].at_s
        switching_s = process.end.at_s - first_s - process.in_steps_s
        self._switching_s = max(self._switching_s, switching_s)


def size_comparison(
    arms: Sequence[Mapping[str, str]],
    stop_rule: StopRule,
    *,
    limit_s: float,
    pace: Pace,
    job_steps: int | None,
) -> Comparison:
    """Make a comparison as long as its time and the program allow.

    If the program ends too early, the comparison has fewer rounds. If the program ends too early
    even for the minimum number of rounds (``count_fewest_rounds``), blocks are shorter than
    ``BLOCK_STEPS`` and ``BLOCK_S``. If the program has cycles, blocks are whole cycles.

    Args:
        arms: the arms.
        stop_rule: the rule that ends the comparison early.
        limit_s: the time that the comparison may take, in seconds. The minimum number of rounds is
            made even if it takes longer.
        pace: the pace of the bare program.
        job_steps: the number of steps of the job; ``None`` if the job has not come to its end in
            any run so far.

    Raises:
        TooFewStepsError: the program ends too early.
    """
    fewest = count_fewest_rounds(len(arms))
    cycle_steps, is_slow = pace.cycle_steps, pace.step_s >= SLOW_STEP_S
    block_steps = max(SLOW_BLOCK_STEPS if is_slow else BLOCK_STEPS, round(BLOCK_S / pace.step_s))
    if cycle_steps > 1:
        block_steps = -(-block_steps // cycle_steps) * cycle_steps
    rounds = int(limit_s / (pace.step_s * block_steps * len(arms))) // 2 * 2
    comparison = Comparison(
        arms=tuple(map(dict, arms)),
        block_steps=block_steps,
        discard_steps=0 if cycle_steps > 1 else max(DISCARD_STEPS, block_steps // 4),
        warmup_steps=WARMUP_STEPS,
        first_steps=SLOW_FIRST_STEPS if is_slow else Comparison.first_steps,
        rounds=min(max(rounds, fewest), MAXIMUM_ROUNDS),
        fewest_rounds=fewest,
        most_seconds=round(max(limit_s, 0.0), 1),
        decide=stop_rule,
    )
    if job_steps is None or comparison.longest_steps <= job_steps:
        return comparison
    in_rounds = len(arms) * comparison.rounds * block_steps
    usable = job_steps - (comparison.longest_steps - in_rounds)
    rounds = max(usable // (block_steps * len(arms)) // 2 * 2, fewest)
    shortest = min(MINIMUM_BLOCK_STEPS, block_steps)
    block_steps = min(block_steps, usable // (rounds * len(arms)))
    if cycle_steps > 1:
        shortest, block_steps = cycle_steps, block_steps // cycle_steps * cycle_steps
    if block_steps < shortest:
        needed = job_steps - usable + fewest * shortest * len(arms)
        raise TooFewStepsError(
            f"this program ends after {job_steps} steps, but comparing {len(arms)} combinations of "
            f"settings in one process takes at least {needed} steps"
        )
    discard_steps = min(comparison.discard_steps, max(DISCARD_STEPS, block_steps // 4))
    return dataclasses.replace(
        comparison, rounds=rounds, block_steps=block_steps, discard_steps=discard_steps
    )


def _suffices(blocks: Sequence[Block], comparison: Comparison) -> bool:
    """Return whether the blocks of an incomplete comparison give all ratios: one for each arm or,
    if the arms are combinations of settings, one for each setting."""
    compared = len(comparison.arms)
    if comparison.decide == "settings":
        compared = 1 + len({item for arm in comparison.arms for item in arm.items()})
    has_all_arms = len({block.arm for block in blocks}) == len(comparison.arms)
    return has_all_arms and len(blocks) >= compared + 1 + MINIMUM_DEGREES_OF_FREEDOM


def count_fewest_rounds(arms: int) -> int:
    """Return the least even number of rounds with enough blocks to estimate confidence intervals.

    See ``wire.ratios.estimate_arm_ratios``.
    """
    blocks = arms + 1 + MINIMUM_DEGREES_OF_FREEDOM
    return 2 * math.ceil(blocks / arms / 2)


def build_arms(group: Sequence[Candidate]) -> tuple[dict[str, str], ...]:
    """Build the arms that compare some candidates; the first arm is empty.

    The arms are combinations of the candidates. Candidates that are compared alone
    (``Knob.is_compared_alone``) are left out of these combinations; each has an arm of its own.
    """
    combined = [one for one in group if not knobs.get(one.knob).is_compared_alone]
    alone = [one.settings for one in group if knobs.get(one.knob).is_compared_alone]
    arms = design.build_arms(group_exclusive(combined)) if combined else ({},)
    return (*arms, *alone)


def group_exclusive(hot: Sequence[Candidate]) -> list[list[tuple[str, str]]]:
    """Group settings that exclude each other.

    These are the settings of one knob, or of knobs that claim the same part of the program
    (``Knob.claims``). Each group is one factor of the factorial design.
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


def _promise(candidate: Candidate) -> float:
    """Return the speedup that a candidate promises; 1 if nothing is known about it."""
    is_unknown = candidate.bound is None and candidate.predicted is None
    return 1.0 if is_unknown else candidate.promise


def _remove(stack: Mapping[str, str], left_out: Collection[str]) -> dict[str, str]:
    """Return the stack without the settings of some knobs."""
    return {knob: setting for knob, setting in stack.items() if knob not in left_out}


def _find_last_arm(failure: TrialFailedError) -> int | None:
    """Return the number of the arm that was applied when the process ended; ``None`` if unknown."""
    if failure.process is None:
        return None
    arms = [e.subject for e in failure.process.events if e.subject.startswith("arm ")]
    return int(arms[-1].removeprefix("arm ")) if arms else None
