"""Chooses how long a tune may take, and how much of that time its proof gets.

A proof runs the bare program and the plan in pairs of fresh processes. Both runs of a pair have the
same number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flatout.tune import statistics
from flatout.tune.pairs import MINIMUM_STEPS, Pace
from flatout.wire.record import WARMUP_STEPS

USUAL_BUDGETS_S = ((0.1, 150.0), (2.0, 480.0), (10.0, 900.0))
"""Step times and the budgets for them, both in seconds, if the user names no budget. Between these
step times, the budget is interpolated. Above the last one, it is proportional to the step time."""

UNKNOWN_BUDGET_S = USUAL_BUDGETS_S[0][1]
"""The budget as long as nothing is known about the program, in seconds."""

START_UPS = 12
"""A budget that flatout chooses has time for at least this many runs: the first run, the gradients,
a comparison, and the pairs of the proof. Each run is assumed to make the steps of one cycle,
after which the program's work repeats (``cycles.py``)."""

PROOF_SHARE = 0.45
"""Share of the budget into which the pairs of a proof should fit."""

WHOLE_SHARE = 0.7
"""The runs of a proof cover a whole cycle of the program, or all of a short job, if
``FEWEST_PAIRS`` pairs of such runs fit into this share of the budget. Otherwise the runs cover only
a part of the cycle or of the job."""

MEASURED_SHARES = (1 / 3, 1 / 6, 1 / 12)
"""A run that mostly starts up tells little. So the steps of a proof's run should take at least a
certain share of the time that the run spends outside its steps. These shares are tried in order
until ``FEWEST_PAIRS`` pairs of such runs fit into ``WHOLE_SHARE`` of the budget. If they never fit,
the last share is used."""

GRADIENTS_SHARE = 0.15
"""If gradients need runs of their own, they are compared for ``GRADIENT_SEEDS`` seeds only if these
runs fit into this share of the budget, and otherwise for one seed."""

GRADIENT_SEEDS = 2
"""Number of seeds for which gradients are compared."""

GRADIENT_STEPS = 4
"""Number of updates of a run whose gradients are compared; fewer if an update takes several
micro-batches. One update would not be enough, because some settings do not affect the first one."""

FEW_STEPS = 8
"""Minimum number of steps of a proof's run if there is no time for ``MINIMUM_STEPS``."""

USUAL_STEPS = 200
"""A proof usually covers at most this many steps. It covers more if the steps are fast
(``USUAL_S``), if a cycle is longer, or if ``Options.steps`` asks for more."""

USUAL_S = 2.0
"""If ``USUAL_STEPS`` steps take less than this many seconds, a proof may cover as many steps as fit
into this time."""

OVERDRAFT = 1.05
"""Work is begun only if it is expected to end within this many times the budget."""


EXTENSION = 1.25
"""If the user has named no budget, a tune may take up to this many times its budget to finish a
proof: a proven plan is worth more than keeping to the announced time."""


@dataclass
class ProofSize:
    """The size of a proof.

    Attributes:
        steps: the number of steps of each run. The tuner reduces it if less time is left than
            planned (``fit_steps``).
        pairs: the minimum number of pairs of runs.
        gradient_seeds: the number of seeds for which gradients are compared.
        warmup_steps: the number of steps that each run of a pair makes before the two begin to
            alternate.
        shares_gradients: whether the runs of a pair record their gradients during these
            ``warmup_steps``, so that gradients need no runs of their own.
    """

    steps: int
    pairs: int
    gradient_seeds: int
    warmup_steps: int = WARMUP_STEPS
    shares_gradients: bool = False


def choose_budget_s(pace: Pace) -> float:
    """Return the budget for a program of this pace, in seconds."""
    points = USUAL_BUDGETS_S
    last_step_s, last_s = points[-1]
    by_step_s = max(points[0][1], pace.step_s / last_step_s * last_s)
    for (low, low_s), (high, high_s) in pairwise(points):
        if low < pace.step_s <= high:
            by_step_s = low_s + (pace.step_s - low) / (high - low) * (high_s - low_s)
    return max(by_step_s, START_UPS * pace.seconds(pace.cycle_steps))


def extend_budget_s(budget_s: float, wanted_s: float, is_named: bool) -> float:
    """Return the budget, extended if it is a little too short for the shortest proof.

    The budget stays as it is if the user has named it, or if the proof would end after more than
    ``EXTENSION`` times the budget.

    Args:
        budget_s: the budget so far, in seconds.
        wanted_s: the time at which the shortest proof would end, in seconds.
        is_named: whether the user has named the budget.
    """
    if is_named or wanted_s > EXTENSION * budget_s:
        return budget_s
    return max(budget_s, wanted_s)


def count_gradient_steps(pace: Pace) -> int:
    """Return how many steps a run makes to record the gradients that are compared.

    The first step is the whole first update: if gradients accumulate, all micro-batches of the
    first update are recorded as one step (``wire/turns.py``). The steps of one or more whole
    updates follow, so there are at least two updates.
    """
    return 1 + -(-GRADIENT_STEPS // pace.micro_batches) * pace.micro_batches


def size_proof(
    pace: Pace,
    budget_s: float,
    *,
    seen_steps: int,
    wanted_steps: int | None = None,
    job_steps: int | None = None,
    may_share_gradients: bool = False,
) -> ProofSize:
    """Choose the size of a proof, so that its pairs of runs fit into the budget if possible.

    Args:
        pace: the pace of the bare program.
        budget_s: the budget, in seconds.
        seen_steps: the number of steps that the first run has timed. A proof covers more steps only
            to reach ``MINIMUM_STEPS``, a whole cycle, the end of a short job or
            ``MEASURED_SHARES``, to record gradients, or if the user asks for more.
        wanted_steps: the number of steps that the user wants; ``None`` if it is left to flatout.
        job_steps: the number of steps of the whole job; ``None`` if it is not known.
        may_share_gradients: whether the runs of a pair can record gradients while they warm up.
    """
    usual = max(USUAL_STEPS, int(USUAL_S / pace.step_s))
    whole, cycle_steps = FEW_STEPS, pace.cycle_steps
    if job_steps is not None and job_steps <= usual and _is_affordable(pace, job_steps, budget_s):
        whole = max(whole, job_steps)
    if cycle_steps > 1 and _is_affordable(pace, WARMUP_STEPS + cycle_steps, budget_s):
        whole = max(whole, WARMUP_STEPS + cycle_steps)
    else:
        cycle_steps = 1
    least = max(MINIMUM_STEPS, whole)
    in_time = [
        (pairs, int((PROOF_SHARE * budget_s / pairs - pace.pair_s(0)) / 2 / pace.step_s))
        for pairs in (statistics.MINIMUM_PAIRS, statistics.FEWEST_PAIRS)
    ]
    pairs, steps = next((one for one in in_time if one[1] >= least), in_time[-1])
    steps = max(min(steps, max(seen_steps, least), max(usual, least)), whole)
    worthwhile = [
        min(int(share * pace.outside_steps_s / pace.step_s), usual) for share in MEASURED_SHARES
    ]
    affordable = (count for count in worthwhile if _is_affordable(pace, count, budget_s))
    steps = max(steps, next(affordable, worthwhile[-1]))
    if cycle_steps > 1:
        steps = WARMUP_STEPS + (steps - WARMUP_STEPS) // cycle_steps * cycle_steps
    recorded_steps = count_gradient_steps(pace)
    if may_share_gradients:
        steps += max(recorded_steps - WARMUP_STEPS, 0)
    steps = wanted_steps or min(steps, job_steps or steps)
    if may_share_gradients and steps - recorded_steps >= FEW_STEPS - WARMUP_STEPS:
        warmup_steps = max(recorded_steps, WARMUP_STEPS)
        return ProofSize(steps, pairs, min(GRADIENT_SEEDS, pairs), warmup_steps, True)
    gradients_s = 2 * pace.seconds(recorded_steps)
    seeds = GRADIENT_SEEDS if GRADIENT_SEEDS * gradients_s <= GRADIENTS_SHARE * budget_s else 1
    return ProofSize(steps, pairs, seeds)


def fit_steps(size: ProofSize, pace: Pace, left_s: float) -> int | None:
    """Return how many steps a proof's run can have if ``FEWEST_PAIRS`` pairs must fit into the time
    that is left.

    The result is ``None`` if these are too few steps, or if the planned number of steps fits.

    Args:
        size: the size of the proof as planned.
        pace: the pace of the bare program, corrected by the time that the last pair took.
        left_s: the time that is left for pairs, in seconds.
    """
    pairs = min(statistics.FEWEST_PAIRS, statistics.MINIMUM_PAIRS)
    steps = int((left_s / pairs - pace.pair_s(0)) / 2 / pace.step_s)
    timed_steps = steps - size.warmup_steps
    if pace.cycle_steps > 1:
        timed_steps -= timed_steps % pace.cycle_steps
    least = max(MINIMUM_STEPS - WARMUP_STEPS, pace.cycle_steps, pace.micro_batches)
    least = max(least, int(MEASURED_SHARES[-1] * pace.outside_steps_s / pace.step_s))
    steps = size.warmup_steps + timed_steps
    return steps if timed_steps >= least and steps < size.steps else None


def _is_affordable(pace: Pace, steps: int, budget_s: float) -> bool:
    """Return whether ``FEWEST_PAIRS`` pairs of runs of this many steps fit into ``WHOLE_SHARE`` of
    the budget."""
    return statistics.FEWEST_PAIRS * pace.pair_s(steps) <= WHOLE_SHARE * budget_s
