"""Comparing settings inside one process by switching between them every few steps (an A/B test).

The arms of the comparison are run in blocks of steps, in order in one round and in reverse order in
the next round (A B C, C B A, ...), and each further pair of rounds starts with another arm. So a
steady drift of the machine's speed cancels within each pair of rounds. Arms are dropped only
between two pairs, so that the remaining arms keep this order.
"""

from __future__ import annotations

import math
import time
import traceback
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flatout.agent import ensemble
from flatout.agent.inputs import InputSizes
from flatout.errors import RefusedError
from flatout.intercept.losses import loss_value
from flatout.wire import ratios
from flatout.wire.disturbance import History, drop_disturbed
from flatout.wire.lines import CpuUsage
from flatout.wire.ratios import Block, Size
from flatout.wire.request import Comparison
from flatout.wire.turns import Turn

if TYPE_CHECKING:
    from flatout.agent.usage import UsageLog
    from flatout.intercept.host import Host

BASELINE = 0


def round_order(arms: Sequence[int], number: int) -> list[int]:
    """Return the order in which the arms are run in a round.

    Args:
        arms: the arms that are not dropped.
        number: the number of the round, from 0.
    """
    first = number // 2 % len(arms)
    order = [*arms[first:], *arms[:first]]
    return order[::-1] if number % 2 else order


def block_order(arms: int, rounds: int) -> Iterator[int]:
    """Yield the arm of each block if no arm is dropped, ``arms * rounds`` in all."""
    for number in range(rounds):
        yield from round_order(range(arms), number)


class Switch:
    """Applies and undoes the settings of the arms at step boundaries.

    An arm is dropped if its settings cannot be applied or fail in use, or if one of its losses is
    not finite while those of the baseline have been: a ``failed`` event with the subject ``arm N``
    gives the reason. An arm that is not worth more steps (see ``Comparison.decide``) is dropped
    with a ``stopped`` event. In a factorial comparison (``decide="settings"``), a setting that
    cannot be applied or fails in use is removed from all arms instead, with a ``failed`` event
    whose subject is ``KNOB=SETTING``; other settings of the knob stay.

    In a job of several processes, all begin the same block at the same step: rank 0 decides which
    arms need no more steps, and an arm or a setting that fails in one process is dropped in all, at
    the end of its block (see ``Ensemble``).

    Args:
        host: the host of this process; its ``arm`` and ``mark`` label the steps.
        comparison: the arms, and the lengths of the blocks. Evaluation passes of a program that
            trains do not count as steps.
        usage: takes a reading of CPU time whenever a block begins; ``None``: there are no readings,
            and every block counts.

    Attributes:
        blocks: the blocks that have begun so far.
    """

    def __init__(self, host: Host, comparison: Comparison, usage: UsageLog | None = None) -> None:
        self._host = host
        self._comparison = comparison
        self._usage = usage
        self._readings: list[CpuUsage] = []
        self._arms = [dict(arm) for arm in comparison.arms]
        self._steps_left = comparison.warmup_steps
        self._discarded_steps = 0
        self._between_ms = 0.0  # evaluation passes since the last step
        self._arm: int | None = None
        self._dropped: set[int] = set()
        self.blocks: list[Block] = []
        self._began_ns: int | None = None
        self._diverged: set[int] = set()
        self._unread: deque[tuple[int, object]] = deque()
        self._baseline_diverges = False
        self._are_weights_damaged = False
        self._sizes = InputSizes(host)
        host.forward_wrappers.append(self._sizes)
        self._switch_to(BASELINE)
        self._schedule = self._schedule_blocks()
        if not self._steps_left:
            self._begin_block()

    def at_boundary(self, turn: Turn) -> bool:
        """Count a step that has ended, and switch to the next arm if its block is over.

        Returns:
            Whether the comparison is over.
        """
        if not self._host.counts_as_step(turn):
            if turn.mark is None:
                self._between_ms += (turn.end_ns - turn.start_ns) / 1e6
            return False
        self._read_losses(turn)
        self._check_failures()
        self._steps_left -= 1
        is_alone = ensemble.find(self._host.roots) is None
        if self._are_weights_damaged and is_alone:
            return self._end()
        if self._host.arm is not None and self._host.mark is None:
            step_ms = self._between_ms + (turn.end_ns - turn.start_ns) / 1e6
            at_s = None if self._usage is None else self._host.record.seconds(turn.start_ns)
            self.blocks[-1].add(step_ms, Size.of(turn), at_s)
        self._between_ms = 0.0
        if self._steps_left <= 0 or (self._arm in self._dropped and is_alone):
            begin_ns = time.perf_counter_ns()
            is_over = self._begin_block()
            self._host.add_pause(begin_ns)
            return is_over
        if self._host.mark == "switched":
            self._discarded_steps += 1
            if self._discarded_steps >= self._comparison.discard_steps:
                self._host.mark = None
        return False

    def _begin_block(self) -> bool:
        """Begin the next block; return whether there is none."""
        reading = None if self._usage is None else self._usage.note()
        self._readings += [] if reading is None else [reading]
        if self._share_failures():
            return self._end()
        for arm, is_first in self._schedule:
            if arm in self._dropped:
                continue
            self._host.events.add("applied", f"arm {arm}", "its block begins")
            self._host.record.flush()  # so that the arm is known if its settings end the process
            if not self._switch_all_to(arm):
                continue
            comparison = self._comparison
            self._steps_left = comparison.first_steps if is_first else comparison.block_steps
            self._discarded_steps = 0
            self.blocks.append(Block(arm))
            self._host.arm = arm
            mark = "first" if is_first else "switched" if comparison.discard_steps else None
            self._host.mark = mark
            return False
        return self._end()

    def _schedule_blocks(self) -> Iterator[tuple[int, bool]]:
        """Yield the arm of each block, and whether the block is one of those before the rounds.

        An arm that has been dropped may be yielded.
        """
        comparison = self._comparison
        for arm in comparison.arms_with_first_steps:
            yield arm, True
        for number in range(comparison.rounds):
            if number % 2 == 0:
                if self._decide_together(number):
                    return
                arms = [arm for arm in range(len(comparison.arms)) if arm not in self._dropped]
            for arm in round_order(arms, number):
                if len(comparison.arms) > 1 and len(self._dropped) == len(comparison.arms) - 1:
                    return
                yield arm, False

    def _share_failures(self) -> bool:
        """Drop what has failed in any process of the job; return whether weights are damaged."""
        processes = ensemble.find(self._host.roots)
        if processes is None:
            return self._are_weights_damaged
        left = [sorted(arm.items()) for arm in self._arms]
        messages = processes.exchange([sorted(self._dropped), left, self._are_weights_damaged])
        for rank, (dropped, of_arms, _) in enumerate(messages):
            for arm in set(dropped) - self._dropped:
                self._drop_failed(arm, f"it has failed in the process of rank {rank}")
            for own, others in zip(self._arms, of_arms, strict=True):
                for name in own.keys() - dict(others).keys():
                    why = f"it has failed in the process of rank {rank}"
                    self._host.events.add("failed", f"{name}={own.pop(name)}", why)
        return any(is_damaged for *_, is_damaged in messages)

    def _switch_all_to(self, arm: int) -> bool:
        """Switch to an arm in all processes of the job; return whether all of them could."""
        has_switched = self._switch_to(arm)
        processes = ensemble.find(self._host.roots)
        if processes is None:
            return has_switched
        could = processes.exchange(has_switched)
        if has_switched and not all(could):
            self._undo()
            rank = could.index(False)
            self._drop_failed(arm, f"it cannot be applied in the process of rank {rank}")
        return all(could)

    def _decide_together(self, rounds: int) -> bool:
        """Drop arms that need no more steps, as rank 0 sees it; return whether the comparison is
        over.

        Args:
            rounds: the number of rounds so far.
        """
        processes = ensemble.find(self._host.roots)
        if processes is None:
            return self._is_late(rounds) or self._decide()
        message: list[Any] = []
        if processes.rank == 0:
            message = [self._is_late(rounds) or self._decide(), sorted(self._dropped)]
        is_decided, dropped = processes.exchange(message)[0]
        for arm in set(dropped) - self._dropped:
            self._drop(arm, "rank 0 has seen enough of it")
        return bool(is_decided)

    def _is_late(self, rounds: int) -> bool:
        """Return whether the time of the comparison is over, see ``Comparison.most_seconds``."""
        now_ns = time.perf_counter_ns()
        if self._began_ns is None:
            self._began_ns = now_ns
        most_s, fewest = self._comparison.most_seconds, self._comparison.fewest_rounds
        return most_s is not None and rounds >= fewest and now_ns - self._began_ns > most_s * 1e9

    def _decide(self) -> bool:
        """Drop arms that need no more steps; return whether the comparison is decided."""
        comparison = self._comparison
        if comparison.decide is None:
            return False
        complete = self._find_counting_blocks()
        worthwhile = comparison.worthwhile
        if comparison.decide == "settings":
            settings = ratios.estimate_setting_ratios(complete, self._arms)
            return bool(settings) and all(
                ratios.is_decided(ratio, worthwhile) for ratio in settings.values()
            )
        to_baseline = ratios.estimate_arm_ratios(complete, BASELINE)
        for arm, ratio in to_baseline.items():
            if arm not in self._dropped and ratio.high < worthwhile:
                self._drop(arm, f"it gains less than {worthwhile:.2f}x: {ratio}")
        if comparison.decide == "arms":
            return bool(to_baseline) and all(
                ratio.low > 1 for arm, ratio in to_baseline.items() if arm not in self._dropped
            )
        remaining = [arm for arm in to_baseline if arm not in self._dropped]
        if not remaining:
            return False
        leader = max(remaining, key=lambda arm: to_baseline[arm].value)
        for arm, ratio in ratios.estimate_arm_ratios(complete, leader).items():
            if arm in remaining and ratio.high < 1:
                remaining.remove(arm)
                self._drop(arm, f"it is slower than arm {leader}: {ratio}")
        return remaining == [leader] and to_baseline[leader].low > 1

    def _find_counting_blocks(self) -> list[Block]:
        """Return the complete blocks that other processes have not disturbed."""
        comparison = self._comparison
        timed_steps = comparison.block_steps - comparison.discard_steps
        complete = [block for block in self.blocks if len(block.times_ms) >= timed_steps]
        counted = drop_disturbed(complete, History(self._readings))
        return counted if comparison.discard_steps else ratios.merge_steps(counted)

    def _drop(self, arm: int, why: str) -> None:
        """Drop an arm that needs no more steps."""
        self._dropped.add(arm)
        self._host.events.add("stopped", f"arm {arm}", why)

    def _end(self) -> bool:
        self._undo()
        self._host.forward_wrappers.remove(self._sizes)
        self._host.arm = None
        self._host.mark = None
        return True

    def _switch_to(self, arm: int) -> bool:
        """Undo the settings of the current arm and apply those of another.

        Returns:
            Whether that was possible. If not, the arm has been dropped.
        """
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
                # A "skipped" event of a knob means that part of the program is left to torch.
                self._remove_setting(name, setting, why, trace)
            else:
                self._drop_failed(arm, why, trace, what)
                self._undo()
                return False
        return True

    def _undo(self) -> None:
        if self._arm is not None:
            for name in reversed(self._comparison.arms[self._arm]):
                self._host.applied.undo(name)
        self._arm = None

    def _check_failures(self) -> None:
        """Drop the current arm, or remove its settings whose knobs have failed in use."""
        if self._arm is not None and self._arm not in self._dropped:
            for name, setting in list(self._arms[self._arm].items()):
                if name in self._host.applied.failures:
                    why = self._host.applied.failures.pop(name)
                    if self._comparison.decide != "settings":
                        self._drop_failed(self._arm, f"{name} = {setting}: {why}")
                        return
                    self._remove_setting(name, setting, why)

    def _remove_setting(self, name: str, setting: str, why: str, trace: str | None = None) -> None:
        """Remove a setting that has failed from all arms."""
        self._host.events.add("failed", f"{name}={setting}", why, trace)
        for arm in self._arms:
            if arm.get(name) == setting:
                del arm[name]

    def _drop_failed(
        self, arm: int, why: str, trace: str | None = None, what: str = "failed"
    ) -> None:
        self._dropped.add(arm)
        self._host.events.add(what, f"arm {arm}", why, trace)

    def _read_losses(self, turn: Turn) -> None:
        """Check the losses that have been copied to the host. Losses on an accelerator are checked
        some steps later."""
        if self._arm is not None:
            self._unread += ((self._arm, loss) for loss in turn.losses)
        while self._unread:
            arm, loss = self._unread[0]
            number = loss_value(loss, wait=False)
            if number is None:
                return
            self._unread.popleft()
            if not math.isfinite(number):
                self._handle_divergence(arm)

    def _handle_divergence(self, arm: int) -> None:
        """Drop an arm after a loss that is not finite, or end the comparison if the weights must be
        damaged."""
        if arm in self._diverged or self._baseline_diverges:
            return
        if self._diverged:
            self._are_weights_damaged = True
            self._host.events.add(
                "noticed", "comparison", "ended: a failed arm has left non-finite weights behind"
            )
        elif arm == BASELINE:
            self._baseline_diverges = True
        else:
            self._diverged.add(arm)
            self._drop_failed(arm, "a loss is not finite")
