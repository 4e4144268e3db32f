"""Finds the number of steps in a cycle of a program.

A program may do some work only every so many steps: evaluation passes after each epoch, rollouts
between two updates of a policy, or the optimizer step after some micro-batches. A *cycle* is the
steps from one occurrence of such work to the next. An evaluation pass is any forward pass without a
backward pass, so rollouts are evaluation passes as well.

In such a program, the time of a step alone does not tell how long the user waits. So times are
compared over whole cycles.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from flatout.wire.record import ProcessRecord

LEAST_SHARE = 0.01
"""If evaluation passes take a smaller share of the time than this, they do not make a cycle."""

LEAST_OPTIMIZER_SHARE = 0.02
"""If optimizer steps take a smaller share of the time than this, they do not make a cycle of
micro-batches. No setting that speeds up the optimizer could then save more than this share."""


def find_cycle_steps(process: ProcessRecord) -> int:
    """Return the number of training steps of a cycle.

    The evaluation passes between two training steps form a group. The result is the number of steps
    from one group to the next or, if this number varies, its median. If there is only one group,
    the steps before it count as a cycle, since most loops begin with a whole cycle. Passes before
    the first step do not count, nor do passes after the last step, which may be the end of the
    program.

    If there is no group, or if the passes take less than ``LEAST_SHARE`` of the time, the result is
    the number of micro-batches for an optimizer step. It is 1 if gradients do not accumulate, or if
    the optimizer step takes less than ``LEAST_OPTIMIZER_SHARE`` of the time.
    """
    steps = process.steps
    passes = [one for one in process.evaluations if one.mark != "profiled"]
    if not steps or not passes:
        return _find_micro_batches(process)
    passes_ms = sum(one.step_ms for one in passes)
    if passes_ms < LEAST_SHARE * (passes_ms + sum(step.step_ms for step in steps)):
        return _find_micro_batches(process)
    places: list[int] = []
    number = 0
    for one in passes:
        while number < len(steps) and steps[number].at_s < one.at_s:
            number += 1
        if 0 < number < len(steps) and number not in places[-1:]:
            places.append(number)
    if not places:
        return _find_micro_batches(process)
    distances = [after - before for before, after in pairwise(places)]
    return round(median(distances)) if distances else places[0]


def _find_micro_batches(process: ProcessRecord) -> int:
    """Return the number of micro-batches for an optimizer step; 1 if this step takes so little time
    that comparisons need not cover whole cycles."""
    timed = process.steady_steps
    whole_ms = sum(step.step_ms for step in timed)
    optimizer_ms = sum(step.phases_ms.get("optimizer") or 0.0 for step in timed)
    return process.micro_batches if optimizer_ms >= LEAST_OPTIMIZER_SHARE * whole_ms else 1
