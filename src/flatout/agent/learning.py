"""A comparison during the real training, after which the settings that are faster stay applied."""

from __future__ import annotations

from statistics import median

from flatout import knobs
from flatout.agent import ensemble
from flatout.agent.switch import BASELINE, Switch
from flatout.errors import RefusedError
from flatout.knob import ConflictError
from flatout.wire import ratios
from flatout.wire.disturbance import History, is_little, mean_taken
from flatout.wire.lines import Learned, LearnedSettings
from flatout.wire.turns import Turn

GIVEN_UP = 1.5
"""An arm is dropped at once if its step time, relative to the last block of the baseline, is larger
than this, because the user is waiting for these steps."""


class Learner(Switch):
    """A comparison whose first arm is the baseline and whose other arms have one setting each.

    At the end the settings that are faster beyond noise are applied together, and the record gets a
    ``learned`` line. The arguments are those of ``Switch``.
    """

    def at_boundary(self, turn: Turn) -> bool:
        """Do the same as ``Switch``, and apply the faster settings at the end."""
        is_over = super().at_boundary(turn)
        if is_over:
            self._apply_faster()
        return is_over

    def _begin_block(self) -> bool:
        self._drop_if_far_slower()
        return super()._begin_block()

    def _drop_if_far_slower(self) -> None:
        """Drop the arm of the block that has ended, if it was far slower than the baseline."""
        timed = [block for block in self.blocks if block.times_ms]
        baseline = [block for block in timed if block.arm == BASELINE]
        if not baseline or timed[-1].arm in self._dropped or timed[-1].arm == BASELINE:
            return
        factor = median(timed[-1].times_ms) / median(baseline[-1].times_ms)
        if factor > GIVEN_UP:
            self._drop(timed[-1].arm, f"a step with it takes {factor:.1f} times as long")

    def _apply_faster(self) -> None:
        """Apply the settings that are faster, the fastest first, and write the results."""
        processes = ensemble.find(self._host.roots)
        if processes is not None and processes.rank:
            for name, setting in processes.exchange([])[0]:
                self._apply(name, setting, {})
            return
        comparison = self._comparison
        complete = self._find_counting_blocks()
        arm_ratios = ratios.estimate_arm_ratios(complete, BASELINE)
        others = mean_taken(complete, History(self._readings))
        settings: dict[str, str] = {}
        learned = []
        for arm in sorted(arm_ratios, key=lambda arm: -arm_ratios[arm].value):
            ((name, setting),) = comparison.arms[arm].items()
            ratio = arm_ratios[arm]
            is_faster = arm not in self._dropped and ratio.low > 1
            if is_faster and knobs.get(name).needs_quiet and not is_little(others):
                why = "its gain only counts on CPUs that other processes are known to leave alone"
                self._host.events.add("skipped", name, why)
                is_faster = False
            kept = is_faster and self._apply(name, setting, settings)
            if kept:
                settings[name] = setting
            learned.append(
                Learned(name, setting, kept, ratio.value, ratio.low, ratio.high, ratio.pairs)
            )
        self._host.record.write(LearnedSettings(tuple(learned)))
        if processes is not None:
            processes.exchange(list(settings.items()))

    def _apply(self, name: str, setting: str, applied: dict[str, str]) -> bool:
        """Apply a setting; return false if its knob refuses it, or conflicts with an applied
        knob."""
        try:
            knobs.check_claims([*applied, name])
            self._host.applied.apply(name, setting)
        except (ConflictError, RefusedError) as refusal:
            self._host.events.add("skipped", name, str(refusal))
            return False
        self._host.events.add("applied", name, f"set to {setting}: it was faster")
        return True
