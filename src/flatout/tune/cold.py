"""Tries each cold candidate on top of the stack, in a few pairs of fresh processes.

A candidate is cold if its knob needs a fresh process, or many steps before it is fast. The stack is
the settings that have won so far, applied together. One run of a pair has the settings of the
stack, and the other run has the candidate's setting in addition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from flatout import knobs
from flatout.tune import memory, pairs, prover, quiet, statistics
from flatout.tune.bare import BareRun
from flatout.tune.candidates import Candidate
from flatout.tune.ledger import Ledger, Options, format_settings
from flatout.tune.pairs import MINIMUM_STEPS, Pairs
from flatout.tune.stage import TuneStage
from flatout.tune.trial import Trials, is_due_to_others
from flatout.wire.record import WARMUP_STEPS

SHORT_STEPS, SHORT_S = 25, 1.0
"""A run that only ranks candidates makes at least ``SHORT_STEPS`` steps, which take at least about
``SHORT_S`` seconds in total. However, it never makes more steps than a run of a proof."""

SLOW_START_S = 120.0
"""Estimate of the time that compiling takes in all runs of a candidate together, in seconds. The
first run compiles, and later runs find most of the compiled code in the cache."""

HOT_SHARE = 0.3
"""Share of the budget that all trials of hot candidates in fresh processes may take together. A hot
candidate can be applied and undone between two steps, so it is normally compared inside one
process. It is tried in fresh processes only if the program has too few steps for that."""


class ColdTrials(TuneStage):
    """Tries the cold candidates of one tune."""

    def __init__(self, trials: Trials, ledger: Ledger, bare: BareRun, options: Options) -> None:
        super().__init__(trials, ledger, bare, options)
        shortest = max(
            SHORT_STEPS, round(SHORT_S / bare.pace.step_s), WARMUP_STEPS + bare.pace.cycle_steps
        )
        self._steps = max(min(bare.proof.steps, shortest), min(bare.proof.steps, MINIMUM_STEPS))
        self._of_hot_s = 0.0

    def extend(
        self, stack: dict[str, str], cold: Sequence[Candidate], again: bool = False
    ) -> dict[str, str]:
        """Extend the stack by the cold settings that make it faster.

        Args:
            stack: the settings so far.
            cold: the candidates; each must already be entered in the ledger.
            again: whether the candidates have been tried on another stack. If so, a candidate for
                which there is no time keeps its entry in the ledger unchanged, and ``HOT_SHARE``
                does not apply.

        Raises:
            KeyboardInterrupt: the user ends the tune.
            UserError: the program fails under the stack.
        """
        settings = dict(stack)
        for candidate in cold:
            if candidate.knob in settings:
                if candidate.is_hot and not again:
                    won = f"{candidate.knob}={settings[candidate.knob]}"
                    self._ledger.skip(candidate.settings, "fresh processes", f"{won} has won")
                continue  # an earlier setting of this knob has won
            other = knobs.find_conflict(candidate.knob, settings)
            if other is not None:
                if not again:
                    why = (
                        f"it cannot be used together with {other}={settings[other]}, which has won"
                    )
                    self._ledger.skip(candidate.settings, "fresh processes", why)
                continue
            if self._is_affordable(candidate, settings, again) and self._try(candidate, settings):
                settings |= candidate.settings
        return settings

    @property
    def _pair_s(self) -> float:
        """The time of a pair of runs that ranks a candidate, in seconds."""
        return self._bare.pace.pair_s(self._steps)

    def _is_affordable(self, candidate: Candidate, stack: Mapping[str, str], again: bool) -> bool:
        """Return whether there is time to try a candidate on top of the stack.

        If there is no time for a candidate's first trial, the reason is entered in the ledger. The
        entry of a candidate that was tried before stays unchanged.
        """
        needed_s = statistics.RANKING_PAIRS * self._pair_s
        if knobs.get(candidate.knob).slow_start:
            needed_s += SLOW_START_S
        spare_s = self._spare_s(stack)
        if again:
            return needed_s <= spare_s
        if candidate.is_hot:  # all hot candidates share this time
            spare_s = min(spare_s, HOT_SHARE * self._ledger.budget_s - self._of_hot_s)
        if needed_s <= spare_s:
            self._of_hot_s += needed_s if candidate.is_hot else 0.0
            return True
        wanted_s = self._ledger.budget_s + needed_s - spare_s
        why = (
            f"trying it takes about {needed_s:.0f} s, which needs a --budget of "
            f"{math.ceil(wanted_s / 60)}m"
        )
        self._ledger.skip(candidate.settings, "fresh processes", why)
        return False

    def _try(self, candidate: Candidate, stack: dict[str, str]) -> bool:
        """Try a candidate on top of the stack; return whether it makes the stack faster."""
        self._ledger.start([candidate], "fresh processes")
        settings = stack | candidate.settings
        tried = Pairs(dict(stack), settings, in_relay=self._bare.can_relay_under(settings))
        self._ledger.print_line(
            f"{candidate} on top of {format_settings(stack) or 'bare'}, in fresh processes"
        )
        pairs.run(
            self._trials,
            tried,
            pace=self._bare.pace,
            steps=self._steps,
            seed=self._options.seed,
            is_enough=self._ledger.follow_pairs(
                f"trying {candidate} in fresh processes",
                statistics.RANKING_PAIRS,
                self._pair_s,
                functools.partial(self._is_ranked, candidate, stack),
                may_exceed=True,
            ),
            print_line=self._ledger.print_line,
        )
        self._ledger.note_runs(tried)
        if tried.interrupted:
            raise KeyboardInterrupt
        return self._judge(candidate, tried)

    def _judge(self, candidate: Candidate, tried: Pairs) -> bool:
        """Enter the result of a candidate in the ledger; return whether it joins the stack."""
        settings = candidate.settings
        if tried.failure is not None:
            if is_due_to_others(tried.failure):
                self._ledger.skip(settings, "fresh processes", tried.failure)
            else:
                self._ledger.fail(settings, tried.failure)
            return False
        without_effect = tried.without_effect()
        if candidate.knob in without_effect:
            self._ledger.reject_without_effect(settings, without_effect[candidate.knob])
            return False
        too_few = tried.quietness.why_too_few
        if too_few is not None:
            self._ledger.skip(settings, "fresh processes", too_few)
            return False
        self._ledger.note_ratio(candidate, tried.ratio)
        is_faster = statistics.is_probably_faster(tried.log_ratios)
        faster = sum(log > 0 for log in tried.log_ratios)
        self._ledger.print_line(
            f"{candidate}: {tried.ratio}, faster in {faster} of {tried.count} pairs"
            f"{'' if is_faster else '; slower' if tried.ratio.high < 1 else '; no measurable gain'}"
        )
        excess = memory.refusal(
            tried.steps(tried.baseline_runs), tried.steps(tried.variant_runs), self._options.memory
        )
        if excess is not None:
            self._ledger.leave_out(settings, excess)
            return False
        if is_faster:
            self._ledger.accept(settings)
        else:
            self._ledger.reject(settings)
        return is_faster

    def _is_ranked(self, candidate: Candidate, stack: Mapping[str, str], tried: Pairs) -> bool:
        """Return whether a candidate has had enough pairs, or no time is left for one more."""
        if candidate.knob in tried.without_effect():
            return True
        is_counted = tried.counted_count >= statistics.RANKING_PAIRS
        if is_counted and statistics.is_ranked(tried.log_ratios):
            return True
        if tried.count >= statistics.MAXIMUM_RANKING_PAIRS + quiet.FEWEST_COUNTED:
            return True
        return tried.count >= statistics.RANKING_PAIRS and self._pair_s > self._spare_s(stack)

    def _spare_s(self, stack: Mapping[str, str]) -> float:
        """Return the time that is left minus the time that the proof needs, in seconds.

        As long as the stack is empty, only the time of the shortest proof is reserved, because
        there may be nothing to prove in the end.
        """
        estimate_s = prover.estimate_s if stack else prover.estimate_least_s
        return self._ledger.left_s - estimate_s(self._bare)
