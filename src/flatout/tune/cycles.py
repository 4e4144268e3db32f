"""Finds the cycles of a program: what recurs every so many steps, such as evaluation passes after
each epoch, the rollouts between two updates of a policy, or the optimizer step after some
micro-batches.

The time of a step alone does not tell what the user waits for in such a program. So times are
compared over whole cycles.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import median

from flatout.wire.record import ProcessRecord

LEAST_SHARE = 0.01
"""Evaluation passes that take a smaller share of the time than this do not make a cycle."""

LEAST_OPTIMIZER_SHARE = 0.02
"""Optimizer steps that take a smaller share of the time than this do not make a cycle of
micro-batches. (No setting of the optimizer could gain more than this share.)"""


def find_cycle_steps(process: ProcessRecord) -> int:
    """Return the number of training steps from one group of evaluation passes to the next.

    If there are no such groups, or if the passes take less than ``LEAST_SHARE`` of the time, the
    result is the number of micro-batches to an optimizer step, or 1 if gradients do not accumulate
    or the optimizer step takes little time. With a group before every step, the result is 1. If
    only one group was seen after the first step, the steps before it count as a cycle, since most
    loops begin with a whole one. Passes after the last step are left out: they may be the end of
    the program. If the distances of the groups differ, the result is their median.
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
    """Return the number of micro-batches of a cycle; 1 if the optimizer step at its end takes so
    little time that comparisons need not cover whole cycles."""
    timed = process.steady_steps
    whole_ms = sum(step.step_ms for step in timed)
    optimizer_ms = sum(step.phases_ms.get("optimizer") or 0.0 for step in timed)
    return process.micro_batches if optimizer_ms >= LEAST_OPTIMIZER_SHARE * whole_ms else 1
