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


def find_cycle_steps(process: ProcessRecord) -> int:
    """Return the number of training steps from one group of evaluation passes to the next.

    If there are no such groups, or one before every step, the result is the number of micro-batches
    to an optimizer step, which is 1 if gradients do not accumulate. If only one group was
    seen after the first step, the steps before it count as a cycle, since most loops begin with a
    whole one. If the distances of the groups differ, the result is their median.
    """
    steps = process.steps
    passes = [one for one in process.evaluations if one.mark != "profiled"]
    if not steps or not passes:
        return process.micro_batches
    passes_ms = sum(one.step_ms for one in passes)
    if passes_ms < LEAST_SHARE * (passes_ms + sum(step.step_ms for step in steps)):
        return process.micro_batches
    places: list[int] = []
    number = 0
    for one in passes:
        while number < len(steps) and steps[number].at_s < one.at_s:
            number += 1
        if number and number not in places[-1:]:
            places.append(number)
    if not places:
        return process.micro_batches
    distances = [after - before for before, after in pairwise(places)]
    return round(median(distances)) if distances else places[0]
