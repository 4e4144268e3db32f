"""Does the plan compute the same? Runs of bare and plan from the same seeds, held side by side.

Pure functions of what was recorded. Every seed has a bare run and a plan run; which checks are made
of them depends on what the settings may change (``EXACTNESS``).

``losses``
    Paired non-inferiority: at each backward call of the step, over the second half of the steps and
    over their last quarter, the mean of plan minus bare with its upper confidence limit (Student's
    t over the seeds) must stay within one standard deviation of bare's own seed-to-seed spread.
    A plan that lowers the loss passes, unless it does so by far more than seeds do: then it trains
    something else. A program that seeds itself gives the same losses whatever seed it starts from.
    The yardstick is then the scatter from batch to batch: the standard error that it gives the mean
    over a window is the least that any other data order would change.
    A loss that has not fallen by more than this margin since the first steps proves little: a plan
    under which nothing is learned would pass as well. The check is then open, and the proof
    ``inconclusive``.
``spikes``
    No single loss is not finite, or above bare's by more than bare ever is above itself.
``identity``
    Asked of ``bitwise`` settings: the same losses and weights, to the bit. Where two bare runs from
    one seed are not identical either, this is open, and the other checks are all there is.

Where bare does not repeat itself (several processes on one set of weights, atomic additions), a
step has no counterpart in another run. A loss is then held against the highest that bare's runs
have in that quarter of the steps, and the margin is at least the spread between them.

``gradients``
    Of the first updates, for each parameter. A wrong constant factor in one gradient turns no
    other, and an optimizer like Adam hides it from the loss. See ``gradients.judge``.
``evaluation``, ``state``
    Losses and figures of passes that do not train; buffers (statistics of batch norm) at the end.
``probabilities``
    Where an outermost module returns them: a precision that rounds those next to 1 to exactly 1 has
    a loss made of them cut off (``log(1 - p)``), and their gradients at 0.
``outputs``
    Of a program that only infers: what comes out for identical inputs.

More seeds make the limits narrower: where settings reorder the data, the difference of two means
over n seeds scatters by ``sqrt(2 / n)`` of the margin. A check that fails only because its limit is
wide is ``undecided``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import correlation, fmean, stdev

from flatout import knobs
from flatout.knob import Exactness
from flatout.plan import Check, LossEvidence
from flatout.tune import gradients
from flatout.wire.lines import Gradient, Output, RootState
from flatout.wire.record import ProcessRecord, Step

Curve = tuple[float, ...]
"""Losses of one backward call of the step, in the order of the steps."""

Moments = Mapping[str, tuple[float, float]]
"""Mean and root mean square of tensors, by their names."""

SITES_LIMIT = 8
"""Backward calls of a step up to which each is looked at on its own (more: their mean)."""

CONFIDENCE = 0.95

MORE_ONES = 0.002
"""Share of a model's probabilities that may become exactly 1."""

LOWER_MARGINS = 6.0
"""Margins by which a plan may lower the loss before it must be training something else."""

SPIKE_DEVIATIONS = 6.0
"""Standard deviations of bare's spread up to which no single loss stands out."""

SPIKE_FACTOR = 2.0
"""By how much a loss that stands out is further from bare's mean than bare's own ever are."""

ROUNDING = 1e-6
"""Of a value, what is no difference: some units in the last place of float32 (2**-23 = 1.2e-7)."""

FIGURE_MARGINS = 6.0
"""Standard deviations between seeds by which no single figure of a state may move."""

FIGURE_CHANGE = 0.1
"""Of the RMS of its tensor: changes of a figure below it are not held to ``FIGURE_MARGINS``."""

LEAST_SPREAD, UNKNOWN_SPREAD = 0.01, 0.05
"""Of a figure between seeds, relative to the RMS of its tensor: what is taken for it where it comes
out smaller, from so few seeds, and where the seeds change nothing."""

OUTPUT_ERRORS = {False: 1e-3, True: 2.0**-4}
"""Relative error that outputs may have, without and with ``reduced`` settings. One rounding to
bfloat16 is an error of up to 2**-9; a deep network adds up hundreds of them, as a random walk."""

TOP1_AGREEMENT = 0.99
"""Of the rows whose best element leads by more than the error that was found."""

CURVE_POINTS, PLAN_CURVE_POINTS = 100, 20
"""Of the curves in a verdict, and of those that go into a plan's file."""


@dataclass(frozen=True)
class Run:
    """What one run shows of what it computes.

    Attributes:
        curves: of its losses, see ``curves``.
        steps: how many it made.
        trains: whether it trained.
        gradients: of the first updates of each parameter; empty where not recorded.
        outputs: of the calls that do not train; empty where not recorded.
        state: of its modules at the end; ``None`` where not recorded.
    """

    curves: tuple[Curve, ...]
    steps: int = 0
    trains: bool = True
    gradients: Mapping[str, Sequence[Gradient]] = field(default_factory=dict)
    outputs: Sequence[Output] = ()
    state: tuple[RootState, ...] | None = None

    @classmethod
    def of(cls, process: ProcessRecord) -> Run:
        """What a process recorded."""
        return cls(
            curves([step for step in process.steps if step.mark != "profiled"]),
            len(process.turns),
            process.trains,
            process.gradients,
            process.outputs,
            process.state,
        )


@dataclass(frozen=True)
class LossCurves:
    """One backward call's losses, means over all seeds and over the steps from one point on.

    Attributes:
        steps: the first step of each point.
        bare, plan: the losses.
        bare_spread, plan_spread: their standard deviations between seeds.
    """

    steps: tuple[int, ...]
    bare: Curve
    plan: Curve
    bare_spread: Curve
    plan_spread: Curve


@dataclass(frozen=True)
class Verdict:
    """What the runs say.

    Attributes:
        passed: whether the plan computes the same within the margins: no check failed.
        why: the reason, one clause.
        kind: ``"bitwise"`` where all that was compared is identical; ``"inconclusive"`` where no
            loss has fallen, so that those checks that remain passed; else ``"non-inferior"``.
        steps: the horizon: how many steps from the start (or calls, of a program that only infers)
            were compared.
        bare_repeats: whether bare gave identical results twice from one seed; ``None``: not tried.
        losses: the figures for each backward call of the step.
        checks: all that were made, the decisive one of a failed verdict first among the failed.
        curves: of the losses, for each backward call of the step.
    """

    passed: bool
    why: str
    kind: str
    steps: int
    bare_repeats: bool | None
    losses: tuple[LossEvidence, ...]
    checks: tuple[Check, ...] = ()
    curves: tuple[LossCurves, ...] = ()

    @property
    def undecided(self) -> bool:
        """Whether it failed only for want of certainty: more seeds may tell."""
        failed = [check for check in self.checks if check.result == "failed"]
        return bool(failed) and all(check.undecided for check in failed)


def curves(steps: Sequence[Step]) -> tuple[Curve, ...]:
    """The loss curves of a run, one for each backward call of the step.

    Steps with another number of backward calls than most are left out, and so are the calls whose
    loss could not be read; none at all gives no curves.
    """
    common = Counter(len(step.losses) for step in steps).most_common(1)
    sites = common[0][0] if common else 0
    rows = [step.losses for step in steps if len(step.losses) == sites]
    readable: list[Curve] = []
    for site in range(sites):
        curve = [value for row in rows if (value := row[site]) is not None]
        if len(curve) == len(rows):
            readable.append(tuple(curve))
    if len(readable) > SITES_LIMIT:
        return (tuple(fmean(values) for values in zip(*readable, strict=True)),)
    return tuple(readable)


def exactness(settings: Mapping[str, str]) -> frozenset[Exactness]:
    """What the settings may change.

    Raises:
        UnknownSettingError: there is no such knob.
    """
    return frozenset(knobs.get(name).exactness[setting] for name, setting in settings.items())


def judge(
    bare: Sequence[Run],
    plan: Sequence[Run],
    repeats: Sequence[Run],
    exactness: Collection[Exactness],
    paired: Sequence[Run] | None = None,
) -> Verdict:
    """Compare bare and plan.

    Args:
        bare, plan: one run for each seed, in the same order of seeds, at least one.
        repeats: more bare runs from the first seed, if there are any; they may be of other length.
        exactness: what the plan's settings may change, see ``exactness``.
        paired: runs of the plan with its settings as ``search.paired`` makes them, for the
            gradients, from the same seeds in the same order; ``None``: those of ``plan``.
    """
    if not any(run.trains for run in bare):
        return _judge_inference(bare, plan, repeats, exactness)
    sites = len(bare[0].curves)
    runs = [*bare, *plan]
    steps = min((len(curve) for run in runs for curve in run.curves), default=0)
    is_repeated = bool(repeats) and all(_are_identical(bare[0], run) for run in repeats)
    if not sites or not steps:
        why = "no loss could be read"
    elif any(len(run.curves) != sites for run in runs):
        why = "the plan changes the number of backward calls of a step"
    else:
        why = None
    if why is not None:
        return Verdict(
            False, why, "non-inferior", steps, is_repeated, (), (Check("losses", "failed", why),)
        )
    same = all(_are_identical(one, other) for one, other in zip(bare, plan, strict=True))
    losses: list[LossEvidence] = []
    checks: list[Check] = []
    for site in range(sites):
        name = "the loss" if sites == 1 else f"loss {site + 1} of {sites}"
        evidence, found = _judge_site(
            name,
            [run.curves[site][:steps] for run in bare],
            [run.curves[site][:steps] for run in plan],
            [run.curves[site][:steps] for run in repeats if len(run.curves) == sites],
        )
        checks += found
        if evidence is not None:
            losses.append(evidence)
    if set(exactness) <= {"bitwise"}:
        checks.append(_judge_identity(bare, plan, same, is_repeated))
    else:
        checks.append(
            gradients.judge(
                [run.gradients for run in bare],
                [run.gradients for run in (plan if paired is None else paired)],
                exactness,
            )
        )
    checks += _judge_evaluation(bare, plan)
    checks.append(_judge_state(bare, plan))
    checks += _judge_probabilities(bare, plan)
    still = next((c for c in checks if c.name == "losses" and c.result == "open"), None)
    if same or any(c.name == "losses" and c.result == "passed" for c in checks):
        still = None
    why = "all losses agree" if still is None else still.why
    return Verdict(
        passed=all(check.result != "failed" for check in checks),
        why=next((c.why for c in checks if c.result == "failed"), why),
        kind="bitwise" if same else "non-inferior" if still is None else "inconclusive",
        steps=steps,
        bare_repeats=is_repeated,
        losses=tuple(losses),
        checks=tuple(checks),
        curves=tuple(
            _mean_curves(
                [run.curves[site][:steps] for run in bare],
                [run.curves[site][:steps] for run in plan],
                CURVE_POINTS,
            )
            for site in range(sites)
        ),
    )


SAME_DATA = 0.5
"""Correlation of two runs' losses from which on they are taken to be of the same batches."""


def have_same_data(one: Run, other: Run) -> bool:
    """Whether the losses of two runs go up and down together from step to step.

    How hard a batch is shows in the losses of both, whatever else is random; their trends, which
    all runs share, are taken out by differences of successive steps.
    """
    for mine, others in zip(one.curves, other.curves, strict=False):
        jumps = [[after - before for before, after in pairwise(curve)] for curve in (mine, others)]
        length = min(map(len, jumps))
        ours, theirs = (jump[length // 4 : length] for jump in jumps)
        if len(ours) > 2 and stdev(ours) > 0 and stdev(theirs) > 0:
            return correlation(ours, theirs) > SAME_DATA
    return True


def _are_identical(one: Run, other: Run) -> bool:
    """In all losses that both have, and, after equally many steps, in all weights."""
    if len(one.curves) != len(other.curves):
        return False
    shared = min((len(c) for run in (one, other) for c in run.curves), default=0)
    for mine, others in zip(one.curves, other.curves, strict=True):
        if mine[:shared] != others[:shared]:
            return False
    digests = [None if run.state is None else [r.digest for r in run.state] for run in (one, other)]
    return None in digests or one.steps != other.steps or digests[0] == digests[1]


def _judge_identity(bare: Sequence[Run], plan: Sequence[Run], same: bool, repeats: bool) -> Check:
    if same:
        weighed = all(run.state is not None for run in (*bare, *plan))
        what = "losses and weights are" if weighed else "all losses are"
        return Check("identity", "passed", f"{what} identical to the bit")
    if not repeats:
        return Check(
            "identity",
            "open",
            "the losses are not identical, nor are those of two bare runs: it cannot be proven",
        )
    by_losses = all(
        _are_identical(_without_state(one), _without_state(other))
        for one, other in zip(bare, plan, strict=True)
    )
    what = "weights" if by_losses else "losses"
    return Check("identity", "failed", f"the {what} are not identical")


def _without_state(run: Run) -> Run:
    return Run(run.curves, run.steps)


# Losses


def _judge_site(
    name: str, bare: Sequence[Curve], plan: Sequence[Curve], repeat: Sequence[Curve]
) -> tuple[LossEvidence | None, list[Check]]:
    """The evidence of one backward call, and its checks."""
    for whose, runs in (("bare", bare), ("the plan", plan)):
        for run in runs:
            for number, value in enumerate(run):
                if not math.isfinite(value):
                    why = f"{name} is not finite at step {number} under {whose}"
                    return None, [Check("spikes", "failed", why)]
    by_seeds = _seeds_matter(bare, repeat)
    again = [curve for curve in repeat if _distance(curve, bare[0]) > 0]
    evidence, check = _judge_losses("losses", name, bare, plan, by_seeds, again)
    if check.result == "passed" and not _has_fallen(bare, evidence.margin):
        begun, ended = _level(bare, _beginning(bare)), evidence.bare_final
        why = (
            f"{name} did not fall within {len(bare[0])} steps (from {begun:.4g} to {ended:.4g}), "
            "so that losses as good as bare's prove little"
        )
        check = Check("losses", "open", why, {**check.figures, "fall": begun - ended})
    return evidence, [_judge_spikes(name, bare, plan, by_seeds, again), check]


BEGINNING = 20
"""The first one in so many steps tells what the loss was before anything was learned."""


def _beginning(curves: Sequence[Curve]) -> range:
    return range(max(len(curves[0]) // BEGINNING, 1))


def _level(curves: Sequence[Curve], part: range) -> float:
    return fmean(_means(curves, part))


def _has_fallen(bare: Sequence[Curve], margin: float) -> bool:
    """Whether a plan under which the loss stays as it begins would be refused: the fall is more
    than the margin, and more than the scatter of the first steps explains."""
    steps, beginning = len(bare[0]), _beginning(bare)
    fall = _level(bare, beginning) - _level(bare, range(steps - max(steps // 4, 1), steps))
    noise = _batch_scatter(bare[0]) / math.sqrt(len(beginning) * len(bare))
    return fall > max(margin, FALL_DEVIATIONS * noise)


FALL_DEVIATIONS = 3.0
"""Of the mean of the first losses, as the scatter from batch to batch gives it."""


def _judge_losses(
    check: str,
    name: str,
    bare: Sequence[Curve],
    plan: Sequence[Curve],
    by_seeds: bool,
    again: Sequence[Curve] = (),
) -> tuple[LossEvidence, Check]:
    """Paired non-inferiority of one series of losses, all of one length.

    Args:
        check, name: of the check, and of the losses.
        bare, plan: one curve for each seed.
        by_seeds: whether seeds change bare's losses.
        again: bare's from the first seed once more, where it does not repeat itself.
    """
    steps = len(bare[0])
    quarter = max(steps // 4, 1)
    windows = [range(steps // 2, steps), range(steps - quarter, steps)]
    yardstick, margin = "batches", _batch_scatter(bare[0]) / math.sqrt(quarter)
    if by_seeds:
        yardstick, margin = "seeds", _spread(bare, windows)
    elif again and (between := _spread([*bare, *again], windows)) > margin:
        yardstick, margin = "runs", between
    bare_final, plan_final = (fmean(_means(runs, windows[-1])) for runs in (bare, plan))
    margin += ROUNDING * abs(bare_final)
    limit, difference = max(_upper_limit(bare, plan, part) for part in windows)
    points = _mean_curves(bare, plan, PLAN_CURVE_POINTS)
    evidence = LossEvidence(
        bare_final=bare_final,
        plan_final=plan_final,
        difference=difference,
        margin=margin,
        yardstick=yardstick,
        bare_curve=points.bare,
        plan_curve=points.plan,
    )
    figures = {"difference": difference, "limit": limit, "margin": margin}
    if limit > margin:
        why = (
            f"{name} differs by {difference:+.3g} on average (up to {limit:+.3g} with "
            f"{CONFIDENCE:.0%} confidence), more than bare's own spread of {margin:.3g}"
        )
        # Runs that differ by themselves have no pairs: both means scatter as those of few runs do.
        is_open = difference < (2 * margin if yardstick == "runs" else margin)
        return evidence, Check(check, "failed", why, figures, undecided=is_open)
    if limit < -LOWER_MARGINS * margin:
        why = (
            f"{name} is lower by {-difference:.3g} on average, far more than bare's own spread of "
            f"{margin:.3g}: it is not the same that is trained"
        )
        return evidence, Check(check, "failed", why, figures)
    why = f"{name} is at most {limit:+.3g} from bare's, within its own spread of {margin:.3g}"
    return evidence, Check(check, "passed", why, figures)


def _spread(curves: Sequence[Curve], windows: Sequence[range]) -> float:
    """Standard deviation between runs of the means over windows."""
    return math.sqrt(fmean(stdev(_means(curves, part)) ** 2 for part in windows))


def _judge_spikes(
    name: str,
    bare: Sequence[Curve],
    plan: Sequence[Curve],
    by_seeds: bool,
    again: Sequence[Curve] = (),
) -> Check:
    """No loss is above bare's of this seed, and above the mean of all seeds, by more than bare's
    own are anywhere in this quarter of the steps.

    Where bare does not repeat itself (``again``, see ``_judge_losses``), no loss is above the
    highest of its runs in this quarter, and above the plan's own before, by more than that highest
    one is above the mean.
    """
    steps, count = len(bare[0]), len(bare)
    own = [*bare, *again] if again else bare
    if by_seeds:
        centre = [fmean(values) for values in zip(*bare, strict=True)]
        left_out = count / (count - 1)  # the mean of the others is so much further away
        above = [
            max(left_out * (run[number] - centre[number]) for run in bare)
            for number in range(steps)
        ]
        scatter = [stdev(values) for values in zip(*bare, strict=True)]
    else:
        centre = list(bare[0])
        jumps = [abs(after - before) / math.sqrt(2) for before, after in pairwise(bare[0])]
        above = scatter = [*jumps, *jumps[-1:]] or [0.0]
    quarter = max(-(-steps // 4), 1)
    for start in range(0, steps, quarter):
        part = slice(start, start + quarter)
        deviation = math.sqrt(fmean(value**2 for value in scatter[part]))
        allowed = max(SPIKE_FACTOR * max(above[part]), SPIKE_DEVIATIONS * deviation)
        highest = -math.inf
        if again:
            highest = max(max(curve[part], default=highest) for curve in own)
            allowed = max(allowed, highest - fmean(fmean(c[part]) for c in own if c[part]))
        for number in range(steps)[part]:
            for mine, other in zip(plan, bare, strict=True):
                expected = max(other[number], centre[number], highest)
                if again:  # how far training had come when a run began is another each time
                    expected = max(expected, fmean(mine[max(number - quarter, 0) : number + 1]))
                if mine[number] - expected > allowed + ROUNDING * abs(expected):
                    why = (
                        f"{name} stands out at step {number}: {mine[number]:.4g} under the plan, "
                        f"{other[number]:.4g} bare"
                    )
                    figures = {"plan": mine[number], "bare": other[number], "allowed": allowed}
                    return Check("spikes", "failed", why, figures)
    return Check("spikes", "passed", f"no single value of {name} stands out")


def _seeds_matter(bare: Sequence[Curve], repeat: Sequence[Curve]) -> bool:
    """Whether another seed changes bare's losses, beyond what repeating it does."""
    if len(bare) < 2:
        return False
    first = bare[0]
    noise = max((_distance(first, curve) for curve in repeat), default=0.0)
    return min(_distance(first, curve) for curve in bare[1:]) > 4 * noise


def _distance(one: Curve, other: Curve) -> float:
    """Root mean square difference over the steps that both have."""
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=False)]
    return math.sqrt(fmean(squares)) if squares else 0.0


def _batch_scatter(curve: Curve) -> float:
    """Standard deviation of the loss around its trend, from differences of successive steps."""
    jumps = [after - before for before, after in pairwise(curve)]
    return stdev(jumps) / math.sqrt(2) if len(jumps) > 1 else 0.0


def _means(runs: Sequence[Curve], part: range) -> list[float]:
    return [fmean(run[part.start : part.stop]) for run in runs]


def _upper_limit(bare: Sequence[Curve], plan: Sequence[Curve], part: range) -> tuple[float, float]:
    """One-sided limit of the mean paired difference over a window, and that mean."""
    from scipy import stats  # type: ignore[import-untyped]

    differences = [
        mine - other for mine, other in zip(_means(plan, part), _means(bare, part), strict=True)
    ]
    centre = fmean(differences)
    count = len(differences)
    if count < 2:
        return centre, centre
    quantile = float(stats.t.ppf(CONFIDENCE, count - 1))
    return centre + quantile * stdev(differences) / math.sqrt(count), centre


def _mean_curves(bare: Sequence[Curve], plan: Sequence[Curve], points: int) -> LossCurves:
    steps = len(bare[0])
    width = max(-(-steps // points), 1)
    starts = range(0, steps, width)

    def over(runs: Sequence[Curve], figure: Callable[[Sequence[float]], float]) -> Curve:
        return tuple(figure(_means(runs, range(s, min(s + width, steps)))) for s in starts)

    def spread(values: Sequence[float]) -> float:
        if not all(map(math.isfinite, values)):
            return math.nan
        return stdev(values) if len(values) > 1 else 0.0

    means, spreads = ([over(runs, f) for runs in (bare, plan)] for f in (fmean, spread))
    return LossCurves(tuple(starts), *means, *spreads)


# Passes that do not train, and the end


def _judge_evaluation(bare: Sequence[Run], plan: Sequence[Run]) -> list[Check]:
    """Losses that evaluation passes return, and the figures of whatever else they do."""
    calls = min((len(run.outputs) for run in (*bare, *plan)), default=0)
    if not calls:
        return []
    checks: list[Check] = []
    of_bare, of_plan = ([_scalars(run.outputs[:calls]) for run in runs] for runs in (bare, plan))
    for name, curve in of_bare[0].items():
        ours, theirs = ([run.get(name, ()) for run in runs] for runs in (of_bare, of_plan))
        if len({len(run) for run in (*ours, *theirs)}) != 1:
            continue  # they branch on what they find
        if not all(math.isfinite(value) for run in (*ours, *theirs) for value in run):
            why = f"{name} is not finite in an evaluation pass"
            checks.append(Check("evaluation", "failed", why))
            continue
        by_seeds = len(ours) > 1 and any(run != curve for run in ours)
        checks.append(_judge_losses("evaluation", name, ours, theirs, by_seeds)[1])
    moments = [[_output_moments(run.outputs[:calls]) for run in runs] for runs in (bare, plan)]
    if any(moments[0]):
        checks.append(_judge_moments("evaluation", "outputs of evaluation passes", *moments))
    return checks


def _scalars(outputs: Sequence[Output]) -> dict[str, Curve]:
    """The losses that calls return, by module and place."""
    found: dict[str, list[float]] = {}
    for output in outputs:
        for place, tensor in enumerate(output.tensors):
            if math.prod(tensor.shape) == 1:
                found.setdefault(f"output {place} of {output.root}", []).append(tensor.mean)
    return {name: tuple(values) for name, values in found.items()}


def _output_moments(outputs: Sequence[Output]) -> Moments:
    """Means over the second half of the calls."""
    found: dict[str, list[tuple[float, float]]] = {}
    for output in outputs[len(outputs) // 2 :]:
        for place, tensor in enumerate(output.tensors):
            if math.prod(tensor.shape) > 1:
                name = f"output {place} of {output.root}"
                found.setdefault(name, []).append((tensor.mean, tensor.rms))
    return {
        name: (fmean(mean for mean, _ in several), fmean(rms for _, rms in several))
        for name, several in found.items()
    }


def _judge_state(bare: Sequence[Run], plan: Sequence[Run]) -> Check:
    if any(run.state is None for run in (*bare, *plan)):
        return Check("state", "open", "the weights at the end were not recorded")
    non_finite = [
        sum(root.non_finite for run in runs for root in run.state or ()) for runs in (bare, plan)
    ]
    if non_finite[1] and not non_finite[0]:
        why = f"{non_finite[1]} elements of weights and buffers are not finite under the plan"
        return Check("state", "failed", why, {"non_finite": non_finite[1]})
    moments = [
        [
            {
                f"{root.root}.{buffer.name}": (buffer.mean, buffer.rms)
                for root in run.state or ()
                for buffer in root.buffers
            }
            for run in runs
        ]
        for runs in (bare, plan)
    ]
    if not any(moments[0]):
        return Check("state", "passed", "all weights are finite; there are no floating buffers")
    return _judge_moments("state", "buffers", *moments)


def _judge_probabilities(bare: Sequence[Run], plan: Sequence[Run]) -> list[Check]:
    """How many of them are exactly 1; no check where no module returns any."""
    shares: list[float] = []
    for runs in (bare, plan):
        roots = [root for run in runs for root in run.state or ()]
        seen = sum(root.probabilities for root in roots)
        if not seen:
            return []
        shares.append(sum(root.ones for root in roots) / seen)
    added = shares[1] - shares[0]
    why = f"{shares[1]:.2%} of the probabilities that the model returns are exactly 1"
    if added > MORE_ONES:
        cut = "a loss made of them is cut off"
        why += f", {shares[0]:.2%} without the plan: {cut}"
        return [Check("probabilities", "failed", why, {"added": added})]
    return [Check("probabilities", "passed", why, {"added": added})]


def _judge_moments(
    check: str, what: str, bare: Sequence[Moments], plan: Sequence[Moments]
) -> Check:
    """Many figures at once: their mean paired differences in units of bare's standard deviation
    between seeds, root mean square over the figures, less what the scatter of so few seeds adds."""
    shifts: list[float] = []
    noises: list[float] = []
    for name in bare[0]:
        if not all(name in run for run in (*bare, *plan)):
            continue
        for place, moment in enumerate(("mean", "RMS")):
            ours, theirs = ([run[name][place] for run in runs] for runs in (bare, plan))
            if not all(map(math.isfinite, ours)):
                continue
            if not all(map(math.isfinite, theirs)):
                return Check(check, "failed", f"the {moment} of {name} is not finite in the plan")
            size = max(run[name][1] for run in bare)
            seeds = len(ours)
            spread = stdev(ours) if seeds > 1 else 0.0
            is_known = spread > ROUNDING * size
            spread = max(spread, (LEAST_SPREAD if is_known else UNKNOWN_SPREAD) * size, ROUNDING)
            differences = [mine - other for mine, other in zip(theirs, ours, strict=True)]
            shift = fmean(differences)
            noise = stdev(differences) / math.sqrt(seeds) if seeds > 1 else 0.0
            shifts.append(shift / spread)
            noises.append(noise / spread)
            is_beyond = abs(shift) - 3 * noise > FIGURE_MARGINS * spread
            if is_beyond and abs(shift) > FIGURE_CHANGE * size:
                means = {"bare": fmean(ours), "plan": fmean(theirs)}
                why = (
                    f"the {moment} of {name} goes from {means['bare']:.4g} to {means['plan']:.4g} "
                    "under the plan"
                )
                return Check(check, "failed", why, means)
    if not shifts:
        return Check(check, "open", f"bare and plan have no {what} in common")
    power = fmean(value**2 for value in shifts) - fmean(value**2 for value in noises)
    moved = math.sqrt(max(power, 0.0))
    why = f"the {what} move by {moved:.2g} of bare's own deviations between seeds"
    figures = {"deviations": moved, "figures": float(len(shifts))}
    return Check(check, "passed" if moved <= 1 else "failed", why, figures)


# Inference


def _judge_inference(
    bare: Sequence[Run],
    plan: Sequence[Run],
    repeats: Sequence[Run],
    exactness: Collection[Exactness],
) -> Verdict:
    seen = [run for run in repeats if run.outputs]
    is_repeated = all(_same_outputs([bare[0]], [run]) for run in seen) if seen else None
    same = _same_outputs(bare, plan)
    check, calls = _judge_outputs(bare, plan, exactness)
    checks = [check]
    if set(exactness) <= {"bitwise"}:
        if same:
            checks.append(Check("identity", "passed", "all outputs are identical to the bit"))
        elif is_repeated:
            checks.insert(0, Check("identity", "failed", "the outputs are not identical"))
        else:
            known = (
                "as those of two bare runs do" if is_repeated is False else "as those of bare may"
            )
            why = f"outputs differ, {known}: identity cannot be proven"
            checks.append(Check("identity", "open", why))
    failed = next((c.why for c in checks if c.result == "failed"), None)
    return Verdict(
        passed=failed is None,
        why=failed or check.why,
        kind="bitwise" if same else "non-inferior",
        steps=calls,
        bare_repeats=is_repeated,
        losses=(),
        checks=tuple(checks),
    )


def _same_outputs(one: Sequence[Run], other: Sequence[Run]) -> bool:
    """Whether there are outputs in full detail, as many on both sides, all identical."""
    sides = [
        [(o.inputs, o.digest) for run in runs for o in run.outputs if o.digest is not None]
        for runs in (one, other)
    ]
    return bool(sides[0]) and sides[0] == sides[1]


def _judge_outputs(
    bare: Sequence[Run], plan: Sequence[Run], exactness: Collection[Exactness]
) -> tuple[Check, int]:
    """Relative error and top-1 agreement where inputs are identical, and how many calls those are.

    The relative error is that of the sampled elements, in the Euclidean norm.
    """
    import numpy as np

    limit = OUTPUT_ERRORS["reduced" in exactness]
    calls = rows = agreeing = clear = clear_agreeing = 0
    worst = 0.0
    for one, other in zip(bare, plan, strict=True):
        for ours, theirs in zip(one.outputs, other.outputs, strict=False):
            if ours.inputs is None or ours.inputs != theirs.inputs:
                continue
            shapes = [[tensor.shape for tensor in o.tensors] for o in (ours, theirs)]
            if shapes[0] != shapes[1]:
                why = f"the outputs of {ours.root} have other sizes under the plan"
                return Check("outputs", "failed", why), calls
            if not ours.tensors and ours.digest != theirs.digest:
                why = f"{ours.root} returns no floating tensors, and others under the plan"
                return Check("outputs", "failed", why), calls
            calls += 1
            for a, b in zip(ours.tensors, theirs.tensors, strict=True):
                if a.sample is None or b.sample is None:
                    continue
                x, y = (np.asarray(t.sample, dtype=np.float64) for t in (a, b))
                if not np.isfinite(x).all():
                    continue  # masks made of infinities
                difference = float(np.linalg.norm(y - x))
                size = float(np.linalg.norm(x))
                if not math.isfinite(difference):
                    why = f"an output of {ours.root} is not finite under the plan"
                    return Check("outputs", "failed", why), calls
                error = difference / size if size else float(difference > 0)
                worst = max(worst, error)
                if a.top1 is not None and b.top1 is not None and a.lead is not None:
                    agree = np.asarray(a.top1) == np.asarray(b.top1)
                    leads = np.asarray(a.lead) > 4 * difference / math.sqrt(len(x))
                    rows += len(agree)
                    agreeing += int(agree.sum())
                    clear += int(leads.sum())
                    clear_agreeing += int((agree & leads).sum())
    if not calls:
        why = "no call had identical inputs on both sides"
        return Check("outputs", "failed", why), 0
    figures = {"relative_error": worst, "limit": limit, "calls": float(calls)}
    why = f"on identical inputs the outputs of {calls} calls differ by at most {worst:.2g}"
    passed = worst <= limit
    why += f" of their size (limit {limit:.2g})"
    if rows:
        figures |= {"top1_agreement": agreeing / rows, "top1_rows": float(rows)}
        why += f"; the first choice agrees in {agreeing / rows:.2%} of {rows} rows"
        if clear and clear_agreeing / clear < TOP1_AGREEMENT:
            passed = False
            why += f", {clear_agreeing / clear:.2%} of those where it is clear"
    return Check("outputs", "passed" if passed else "failed", why, figures), calls
