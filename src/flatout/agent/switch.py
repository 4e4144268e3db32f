"""A comparison inside one process: settings take turns in blocks of steps.

Blocks go through the arms forwards in one round and backwards in the next (A B C, C B A, ...; after
each such pair of rounds another arm begins), so that a steady drift of the machine's speed cancels
within each pair of rounds.
"""

from __future__ import annotations

import math
import traceback
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flatout import knobs
from flatout.request import Comparison
from flatout.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.session import Session

BASELINE = 0


def block_order(arms: int, rounds: int) -> Iterator[int]:
    """The arm of each block, ``arms * rounds`` of them."""
    for number in range(rounds):
        first = number // 2 % arms
        order = [(first + place) % arms for place in range(arms)]
        yield from reversed(order) if number % 2 else order


class Switch:
    """Applies and undoes the settings of the arms at step boundaries.

    An arm whose settings can't be applied, or whose steps give a non-finite loss while the baseline
    never has, is out: a ``failed`` event with the subject ``arm N`` says so.

    Args:
        session: the session of this process; its ``arm`` and ``mark`` label the steps.
        comparison: what to compare; counted are steps of training, not evaluation passes.
    """

    def __init__(self, session: Session, comparison: Comparison) -> None:
        self._session = session
        self._comparison = comparison
        self._blocks = block_order(len(comparison.arms), comparison.rounds)
        self._left = comparison.warmup_steps
        self._arm: int | None = None
        self._out: set[int] = set()
        self._diverged: set[int] = set()
        self._unread: deque[tuple[int, object]] = deque()
        self._baseline_diverges = False
        self._spoilt = False
        self._set(BASELINE)
        if not self._left:
            self._next_block()

    def at_boundary(self, turn: Turn) -> bool:
        """A turn has closed; returns whether the comparison is over."""
        if turn.kind != "step":
            return False
        self._read_losses(turn)
        self._look_for_failed_knobs()
        self._left -= 1
        if self._spoilt:
            return self._end()
        if self._left <= 0 or self._arm in self._out:
            return self._next_block()
        comparison = self._comparison
        if self._session.arm is not None and (
            comparison.block_steps - self._left >= comparison.discard_steps
        ):
            self._session.mark = None
        return False

    def _next_block(self) -> bool:
        arms = len(self._comparison.arms)
        for arm in self._blocks:
            if arms > 1 and len(self._out) == arms - 1:
                break
            if arm in self._out or not self._set(arm):
                continue
            self._left = self._comparison.block_steps
            self._session.arm = arm
            self._session.mark = "switched" if self._comparison.discard_steps else None
            self._session.event("applied", f"arm {arm}", "its turn")
            return False
        return self._end()

    def _end(self) -> bool:
        self._undo()
        self._session.arm = None
        self._session.mark = None
        return True

    def _set(self, arm: int) -> bool:
        """Bring the process from the settings of the current arm to those of another."""
        if arm == self._arm:
            return True
        self._undo()
        self._arm = arm
        for name, setting in self._comparison.arms[arm].items():
            try:
                self._session.turn(name, setting)
            except knobs.RefusedError as refusal:
                self._disqualify(arm, str(refusal))
                self._undo()
                return False
            except Exception as error:  # noqa: BLE001 - recorded with its traceback
                why = f"{name} = {setting}: {type(error).__name__}: {error}"
                self._disqualify(arm, why, traceback.format_exc())
                self._undo()
                return False
        return True

    def _undo(self) -> None:
        if self._arm is not None:
            for name in reversed(self._comparison.arms[self._arm]):
                self._session.turn_off(name)
        self._arm = None

    def _look_for_failed_knobs(self) -> None:
        if self._arm is not None and self._arm not in self._out:
            for name, setting in self._comparison.arms[self._arm].items():
                if name in self._session.failed_knobs:
                    why = self._session.failed_knobs.pop(name)
                    self._disqualify(self._arm, f"{name} = {setting}: {why}")
                    return

    def _disqualify(self, arm: int, why: str, trace: str | None = None) -> None:
        self._out.add(arm)
        self._session.event("failed", f"arm {arm}", why, trace)

    def _read_losses(self, turn: Turn) -> None:
        """Look at the losses that have arrived; on an accelerator that may be some steps later."""
        if self._arm is not None:
            self._unread += ((self._arm, loss) for loss in turn.losses)
        while self._unread:
            arm, loss = self._unread[0]
            number = self._session.losses.number(loss, wait=False)
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
            self._session.event(
                "noticed", "comparison", "ended: a failed arm has left non-finite weights behind"
            )
        elif arm == BASELINE:
            self._baseline_diverges = True
        else:
            self._diverged.add(arm)
            self._disqualify(arm, "a loss is not finite")
