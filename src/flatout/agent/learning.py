"""A comparison in the real training: what is faster stays on, and the program goes on."""

from __future__ import annotations

from statistics import median

from flatout import knobs
from flatout.agent.switch import BASELINE, Switch
from flatout.errors import RefusedError
from flatout.knob import ConflictError
from flatout.wire import ratios
from flatout.wire.lines import Learned, LearnedSettings
from flatout.wire.turns import Turn

GIVEN_UP = 1.5
"""Times bare's last block that an arm may take: these are steps that someone waits for."""


class Learner(Switch):
    """A comparison of single settings with the bare program, each an arm.

    An arm whose block takes far longer than bare's last one leaves at once. In the end those that
    are faster beyond noise are turned on together, and the record gets a line ``learned``.

    Args:
        host, comparison: see ``Switch``.
    """

    def at_boundary(self, turn: Turn) -> bool:
        """See ``Switch``."""
        over = super().at_boundary(turn)
        if over:
            self._keep()
        return over

    def _next_turn(self) -> bool:
        self._give_up()
        return super()._next_turn()

    def _give_up(self) -> None:
        """Let the arm leave that has just had its turn, if that took far too long."""
        timed = [block for block in self.found if block.times_ms]
        bare = [block for block in timed if block.arm == BASELINE]
        if not bare or timed[-1].arm in self._out or timed[-1].arm == BASELINE:
            return
        factor = median(timed[-1].times_ms) / median(bare[-1].times_ms)
        if factor > GIVEN_UP:
            self._leaves(timed[-1].arm, f"a step under it takes {factor:.1f} times as long")

    def _keep(self) -> None:
        """Turn on what has won, the fastest first, and write down what has been learned."""
        comparison = self._comparison
        timed_steps = comparison.block_steps - comparison.discard_steps
        blocks = [block for block in self.found if len(block.times_ms) >= timed_steps]
        found = ratios.arm_ratios(blocks, BASELINE)
        settings: dict[str, str] = {}
        learned = []
        for arm in sorted(found, key=lambda arm: -found[arm].value):
            ((name, setting),) = comparison.arms[arm].items()
            ratio = found[arm]
            kept = arm not in self._out and ratio.low > 1 and self._turned(name, setting, settings)
            if kept:
                settings[name] = setting
            learned.append(
                Learned(name, setting, kept, ratio.value, ratio.low, ratio.high, ratio.pairs)
            )
        self._host.record.write(LearnedSettings(tuple(learned)))

    def _turned(self, name: str, setting: str, on: dict[str, str]) -> bool:
        """Turn it on, unless that fails or does not go with what is on."""
        try:
            knobs.check_claims([*on, name])
            self._host.applied.apply(name, setting)
        except (ConflictError, RefusedError) as refusal:
            self._host.events.add("skipped", name, str(refusal))
            return False
        self._host.events.add("applied", name, f"set to {setting}: it was faster")
        return True
