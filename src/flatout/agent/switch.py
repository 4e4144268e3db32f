"""A comparison inside one process: settings take turns in blocks of steps.

Blocks go through the arms forwards in one round and backwards in the next (A B C, C B A, ...; after
each such pair of rounds another arm begins), so that a steady drift of the machine's speed cancels
within each pair of rounds. Arms leave between two pairs, so that those that stay keep this order.
"""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from flatout.agent.inputs import InputSizes
from flatout.errors import RefusedError
from flatout.intercept.losses import loss_number
from flatout.wire import ratios
from flatout.wire.ratios import Block, Size
from flatout.wire.request import Comparison
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.intercept.host import Host

BASELINE = 0


def round_order(arms: Sequence[int], number: int) -> list[int]:
    """The arms in the order of their turns in a round.

    Args:
        arms: that have not left.
        number: of the round, from 0.
    """
    first = number // 2 % len(arms)
    order = [*arms[first:], *arms[:first]]
    return order[::-1] if number % 2 else order


def block_order(arms: int, rounds: int) -> Iterator[int]:
    """The arm of each block, ``arms * rounds`` of them, if none leaves."""
    for number in range(rounds):
        yield from round_order(range(arms), number)


class Switch:
    """Applies and undoes the settings of the arms at step boundaries.

    An arm whose settings can't be applied, or whose steps give a non-finite loss while the baseline
    never has, is out: a ``failed`` event with the subject ``arm N`` says so. So is one that is not
    worth more steps (see ``Comparison.decide``): a ``stopped`` event says so. Where settings are
    compared by stacks of them, a setting that can't be applied, or fails in use, is left out of all
    arms instead: a ``failed`` event has its knob as the subject.

    Args:
        host: of this process; its ``arm`` and ``mark`` label the steps.
        comparison: what to compare; counted are steps of training, not evaluation passes.

    Attributes:
        found: the blocks so far.
    """

    def __init__(self, host: Host, comparison: Comparison) -> None:
        self._host = host
        self._comparison = comparison
        self._arms = [dict(arm) for arm in comparison.arms]
        self._left = comparison.warmup_steps
        self._discarded = 0
        self._arm: int | None = None
        self._out: set[int] = set()
        self.found: list[Block] = []
        self._diverged: set[int] = set()
        self._unread: deque[tuple[int, object]] = deque()
        self._baseline_diverges = False
        self._spoilt = False
        self._sizes = InputSizes(host)
        host.forward_wrappers.append(self._sizes)
        self._set(BASELINE)
        self._turns = self._all_turns()
        if not self._left:
            self._next_turn()

    def at_boundary(self, turn: Turn) -> bool:
        """A turn has closed; returns whether the comparison is over."""
        if not self._host.counts_as_step(turn):
            return False
        self._read_losses(turn)
        self._look_for_failed_knobs()
        self._left -= 1
        if self._spoilt:
            return self._end()
        if self._host.arm is not None and self._host.mark is None:
            self.found[-1].add((turn.end_ns - turn.start_ns) / 1e6, Size.of(turn))
        if self._left <= 0 or self._arm in self._out:
            return self._next_turn()
        if self._host.mark == "switched":
            self._discarded += 1
            if self._discarded >= self._comparison.discard_steps:
                self._host.mark = None
        return False

    def _next_turn(self) -> bool:
        for arm, is_first in self._turns:
            if arm in self._out:
                continue
            self._host.events.add("applied", f"arm {arm}", "its turn")
            self._host.record.flush()  # if it ends the process, it must be known which it was
            if not self._set(arm):
                continue
            comparison = self._comparison
            self._left = comparison.first_steps if is_first else comparison.block_steps
            self._discarded = 0
            self.found.append(Block(arm))
            self._host.arm = arm
            mark = "first" if is_first else "switched" if comparison.discard_steps else None
            self._host.mark = mark
            return False
        return self._end()

    def _all_turns(self) -> Iterator[tuple[int, bool]]:
        """Arms, and whether it is a turn before the rounds; arms that are out may be among them."""
        comparison = self._comparison
        for arm in comparison.first_turns:
            yield arm, True
        for number in range(comparison.rounds):
            if number % 2 == 0:
                if self._is_decided():
                    return
                arms = [arm for arm in range(len(comparison.arms)) if arm not in self._out]
            for arm in round_order(arms, number):
                if len(comparison.arms) > 1 and len(self._out) == len(comparison.arms) - 1:
                    return
                yield arm, False

    def _is_decided(self) -> bool:
        """Let arms leave that need no more steps; whether nothing is left to find out."""
        comparison = self._comparison
        if comparison.decide is None:
            return False
        timed_steps = comparison.block_steps - comparison.discard_steps
        found = [block for block in self.found if len(block.times_ms) >= timed_steps]
        worthwhile = comparison.worthwhile
        if comparison.decide == "settings":
            settings = ratios.setting_ratios(found, self._arms)
            return bool(settings) and all(
                ratios.is_decided(ratio, worthwhile) for ratio in settings.values()
            )
        to_baseline = ratios.arm_ratios(found, BASELINE)
        for arm, ratio in to_baseline.items():
            if arm not in self._out and ratio.high < worthwhile:
                self._leaves(arm, f"it gains less than {worthwhile:.2f}x: {ratio}")
        if comparison.decide == "arms":
            return bool(to_baseline) and all(
                ratio.low > 1 for arm, ratio in to_baseline.items() if arm not in self._out
            )
        left = [arm for arm in to_baseline if arm not in self._out]
        if not left:
            return False
        leader = max(left, key=lambda arm: to_baseline[arm].value)
        for arm, ratio in ratios.arm_ratios(found, leader).items():
            if arm in left and ratio.high < 1:
                left.remove(arm)
                self._leaves(arm, f"it is slower than arm {leader}: {ratio}")
        return left == [leader] and to_baseline[leader].low > 1

    def _leaves(self, arm: int, why: str) -> None:
        self._out.add(arm)
        self._host.events.add("stopped", f"arm {arm}", why)

    def _end(self) -> bool:
        self._undo()
        self._host.forward_wrappers.remove(self._sizes)
        self._host.arm = None
        self._host.mark = None
        return True

    def _set(self, arm: int) -> bool:
        """Bring the process from the settings of the current arm to those of another."""
        if arm == self._arm:
            return True
        self._undo()
        self._arm = arm
        for name, setting in list(self._arms[arm].items()):
            trace = None
            what = "failed"
            try:
                self._host.applied.apply(name, setting)
            except RefusedError as refusal:
                why, what = str(refusal), "skipped"
            except Exception as error:  # noqa: BLE001 - recorded with its traceback
                why = f"{name} = {setting}: {type(error).__name__}: {error}"
                trace = traceback.format_exc()
            else:
                continue
            if self._comparison.decide == "settings":
                self._host.events.add("failed", name, why, trace)  # skipped would say: in part
                self._leave_out(name, setting)
            else:
                self._disqualify(arm, why, trace, what)
                self._undo()
                return False
        return True

    def _undo(self) -> None:
        if self._arm is not None:
            for name in reversed(self._comparison.arms[self._arm]):
                self._host.applied.undo(name)
        self._arm = None

    def _look_for_failed_knobs(self) -> None:
        if self._arm is not None and self._arm not in self._out:
            for name, setting in list(self._arms[self._arm].items()):
                if name in self._host.applied.failures:
                    why = self._host.applied.failures.pop(name)
                    if self._comparison.decide == "settings":
                        self._leave_out(name, setting)
                    else:
                        self._disqualify(self._arm, f"{name} = {setting}: {why}")
                    return

    def _leave_out(self, name: str, setting: str) -> None:
        """No arm turns this on any more."""
        for arm in self._arms:
            if arm.get(name) == setting:
                del arm[name]

    def _disqualify(
        self, arm: int, why: str, trace: str | None = None, what: str = "failed"
    ) -> None:
        self._out.add(arm)
        self._host.events.add(what, f"arm {arm}", why, trace)

    def _read_losses(self, turn: Turn) -> None:
        """Look at the losses that have arrived; on an accelerator that may be some steps later."""
        if self._arm is not None:
            self._unread += ((self._arm, loss) for loss in turn.losses)
        while self._unread:
            arm, loss = self._unread[0]
            number = loss_number(loss, wait=False)
            if number is None:
                return
            self._unread.popleft()
            if not math.isfinite(number):
                self._non_finite(arm)

    def _non_finite(self, arm: int) -> None:
        if arm in self._diverged or self._baseline_diverges:
            return
        if self._diverged:
            self._spoilt = True
            self._host.events.add(
                "noticed", "comparison", "ended: a failed arm has left non-finite weights behind"
            )
        elif arm == BASELINE:
            self._baseline_diverges = True
        else:
            self._diverged.add(arm)
            self._disqualify(arm, "a loss is not finite")
