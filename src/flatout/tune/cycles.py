"""Finds the cycles of a program: what recurs every so many steps, such as evaluation passes after
each epoch, or the rollouts between two updates of a policy.

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

    The result is 1 if there are no such groups, or one before every step. If only one group was
    seen after the first step, the steps before it count as a cycle, since most loops begin with a
    whole one. Passes after the last step are left out: they may be the end of the program. If the
    distances of the groups differ, the result is their median.
    """
    steps = process.steps
    passes = [one for one in process.evaluations if one.mark != "profiled"]
    if not steps or not passes:
        return 1
    passes_ms = sum(one.step_ms for one in passes)
    if passes_ms < LEAST_SHARE * (passes_ms + sum(step.step_ms for step in steps)):
        return 1
    places: list[int] = []
    number = 0
    for one in passes:
        while number < len(steps) and steps[number].at_s < one.at_s:
            number += 1
        if 0 < number < len(steps) and number not in places[-1:]:
            places.append(number)
    if not places:
        return 1
    distances = [after - before for before, after in pairwise(places)]
    return round(median(distances)) if distances else places[0]
