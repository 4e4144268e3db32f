"""Chooses hot settings by predictions of their gains, for programs with slow steps.

Hot settings can be turned on and off between two steps. To compare combinations of them takes
dozens of steps for each combination, which is too long if a step takes a good part of a second. So
the stack, the settings that are applied together, is put together from what replayed calls predict
(``prediction.py``). Whole steps are compared only for settings without a prediction, and for
settings whose predicted gain is in doubt.
"""

from __future__ import annotations

from collections.abc import Sequence

from flatout import knobs
from flatout.tune import prediction, statistics
from flatout.tune.candidates import Candidate
from flatout.tune.screen import LEFT_TO_THE_PROOF, SLOW_STEP_S, Screening
from flatout.wire.ratios import Ratio


def choose_screening(step_s: float, candidates: Sequence[Candidate]) -> type[Screening]:
    """Choose how hot candidates are screened.

    Args:
        step_s: the time of a step of the bare program, in seconds.
        candidates: the candidates.
    """
    is_predicted = any(one.predicted is not None for one in candidates)
    return PredictedScreening if is_predicted and step_s >= SLOW_STEP_S else Screening


class PredictedScreening(Screening):
    """A screening that chooses mostly by the predictions from replayed calls."""

    def find_stack(self, hot: Sequence[Candidate]) -> dict[str, str]:
        """Find the hot settings that make the program faster together.

        Args:
            hot: the candidates; each must already be entered in the ledger.

        Raises:
            UserError: the program fails when it runs again.
        """
        predicted = [one for one in hot if one.predicted is not None]
        gains, undecided = self._choose(predicted)
        stack = {one.knob: one.setting for one in gains}
        others = []
        for one in (*undecided, *(one for one in hot if one.predicted is None)):
            chosen = knobs.find_conflict(one.knob, stack)
            if chosen is None:
                others.append(one)
            else:
                why = f"it cannot be used together with {chosen}={stack[chosen]}, which gains more"
                self._ledger.leave_out(one.settings, why)
        return self._check(stack, [one for one in gains if gains[one].low <= 1], others)

    def _choose(
        self, predicted: Sequence[Candidate]
    ) -> tuple[dict[Candidate, Ratio], Sequence[Candidate]]:
        """Choose settings by their predictions, and enter the chosen and the rejected ones in the
        ledger.

        Each chosen setting is predicted to make the step faster on top of those chosen before it.

        Returns the chosen settings, each with this predicted gain, and the settings whose gain the
        predictions leave open.
        """
        replayed = self._bare.process.replayed
        assert replayed is not None
        choice = prediction.choose_stack(replayed, self._bare.pace.step_s * 1e3, predicted)
        for candidate, gain in choice.chosen.items():
            said = f"predicted {gain.value:.2f}x on top of the others; the proof measures it"
            self._ledger.accept(candidate.settings, said)
            self._ledger.print_line(f"{candidate}: {said}")
        for candidate, why in choice.others.items():
            self._ledger.reject(candidate.settings, why)
            self._ledger.print_line(f"{candidate} is left out: {why}")
        return choice.chosen, list(choice.undecided)

    def _check(
        self, stack: dict[str, str], doubtful: Sequence[Candidate], others: Sequence[Candidate]
    ) -> dict[str, str]:
        """Correct the stack by a comparison of whole steps.

        The stack is compared with other stacks: each lacks one doubtful setting, or has one of the
        other settings added.

        Args:
            stack: the settings that the predictions have chosen.
            doubtful: the settings of the stack that may gain nothing, by their predictions.
            others: settings without a prediction, or whose prediction leaves their gain open.

        Returns the stack without the doubtful settings that it does not need, and with the other
        settings that make it faster or that the comparison leaves open.
        """
        without = [{k: s for k, s in stack.items() if k != one.knob} for one in doubtful]
        arms = (stack, *without, *(stack | one.settings for one in others))
        if len(arms) == 1:
            return stack
        changes = [f"without {one}" for one in doubtful] + [f"with {one}" for one in others]
        compared = f"the predicted settings, and the same with one change: {', or '.join(changes)}"
        self._ledger.start(others, "inside one process")
        found = self._compare_with_first(arms, "arms", compared)
        less = {one: found[n] for n, one in enumerate(doubtful, 1) if n in found}
        grown = dict(stack)
        for candidate in statistics.find_redundant(less)[: max(len(stack) - 1, 0)]:
            if less[candidate].value >= 1:
                why = "the other settings are as fast without it"
                self._ledger.leave_out(candidate.settings, why)
                del grown[candidate.knob]
        on_top: dict[Candidate, Ratio] = {}
        for number, candidate in enumerate(others, 1 + len(doubtful)):
            if number not in found:
                why = "the comparison of whole steps gave no result for it"
                self._ledger.skip(candidate.settings, "inside one process", why)
                continue
            on_top[candidate] = found[number]
            self._ledger.note_ratio(candidate, found[number])
            self._ledger.reject(candidate.settings)
        for candidate in statistics.pick_winners(on_top):
            if self._fits(candidate, grown):
                grown |= candidate.settings
                self._ledger.accept(candidate.settings, f"{on_top[candidate]} on top of the others")
        for candidate, ratio in on_top.items():
            is_open = candidate.predicted is not None and self._is_open(ratio)
            if is_open and self._fits(candidate, grown):
                grown |= candidate.settings
                self._ledger.accept(candidate.settings, LEFT_TO_THE_PROOF)
        return grown

    @staticmethod
    def _fits(candidate: Candidate, stack: dict[str, str]) -> bool:
        is_alone = knobs.find_conflict(candidate.knob, stack) is None
        return candidate.knob not in stack and is_alone
