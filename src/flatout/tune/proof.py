"""Checks whether a plan computes the same as the bare program, from runs of both with the same
seeds.

Each seed has a bare run and a plan run. The exactness classes of the settings (``knob.EXACTNESS``)
tell which checks are made. The functions are pure functions of records.

``losses``
    This check is paired non-inferiority, for each backward call of the step, over the second half
    of the steps and over the last quarter. The upper confidence limit (Student's t over the seeds)
    of the mean of plan minus bare must be at most the margin. The margin is one seed-to-seed
    standard deviation of bare's mean loss. A plan that lowers the loss passes, unless it lowers the
    loss by far more than a different seed does: such a plan appears to train something else.
    Flatout varies the seed by adding an offset to the seeds that the program sets by calls like
    ``torch.manual_seed`` (``agent/seeds.py``). Flatout cannot reach a ``torch.Generator`` of the
    program's own, for example; a program that uses only such generators gives the same losses from
    every seed. For such a program, the margin is the standard error of the mean loss of the last
    quarter, computed from the scatter from batch to batch: a different order of the data would
    change this mean by at least as much.
    If the loss has not fallen by more than the margin since the first steps, the check proves
    little: a plan under which nothing is learned would pass as well. The check is then open
    (neither passed nor failed), and the proof ``inconclusive``.
``spikes``
    Each loss must be finite, and may exceed its reference by at most an allowance. The reference is
    the bare loss of the same step and seed, or the mean of the bare losses of all seeds in this
    step, whichever is higher. The allowance is the larger of two values: twice the largest excess
    of a bare loss over the mean of the other seeds, and six times the standard deviation of the
    bare losses between seeds. Each quarter of the steps has an allowance of its own.
    ``_judge_spikes`` says what holds if seeds do not change the losses.
``identity``
    If all settings are of the class ``bitwise``, losses and weights must be bitwise identical to
    bare's. If bare itself gives different results in two runs from one seed, this check is open,
    and the other checks decide.
``gradients``
    The gradients of the first updates are compared for each parameter, because the loss hardly
    shows a wrong constant factor in one gradient under an optimizer like Adam. See
    ``gradients.judge``.
``evaluation``
    The losses and outputs of passes that do not train are compared.
``state``
    The buffers at the end of the run (such as the statistics of batch norm) are compared. Weights
    and buffers must be finite if bare's are.
``probabilities``
    If a precision rounds probabilities near 1 to exactly 1, a loss that contains ``log(1 - p)``
    becomes infinite or is clamped, and the gradients of these probabilities become 0. Therefore,
    of the probabilities that the outermost modules return, the share that is exactly 1 may rise by
    at most ``MORE_ONES`` under the plan. (The program itself calls the outermost modules; they call
    all others.)
``outputs``
    If the program only infers, its outputs for identical inputs are compared.

Some programs do not repeat themselves: two runs from one seed differ, because several processes
train one set of weights, or because of atomic additions. In such a program, a step has no
counterpart in the other runs, and a loss counts as a spike only if it also exceeds bare's highest
loss in the same quarter of the steps by more than the allowance. If a different seed changes the
losses hardly more than a repeat from the same seed does, the margin is at least the spread between
bare's runs.

More seeds bring the confidence limits closer to the means. If settings change the order of the data
(the class ``reshuffled``), bare and plan differ as much as two seeds do: the difference of their
means over n seeds has a standard deviation of ``sqrt(2 / n)`` times the margin. If a check fails
only because its confidence limit is far from the mean difference, the check is ``undecided``.
"""

from __future__ import annotations

import dataclasses
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
"""The losses of one backward call of the step, in the order of the steps."""

Moments = Mapping[str, tuple[float, float]]
"""The mean and the root mean square of tensors, by their names."""

SITES_LIMIT = 8
"""If a step has at most this many backward calls (sites), each is judged separately; if it has
more, only the mean loss of all of them is judged."""

CONFIDENCE = 0.95
"""Confidence of the upper limit on the mean difference of losses."""

BEGINNING_SHARE = 1 / 20
"""The mean loss of this share of the steps, from the first one on, counts as the loss before
anything was learned."""

FALL_DEVIATIONS = 3.0
"""A loss has fallen only if its fall exceeds this many standard errors of the mean of its first
values. The standard error is computed from the scatter from batch to batch."""

SAME_DATA = 0.5
"""Two runs count as having the same batches if the changes of their losses from step to step have
more than this correlation."""

MORE_ONES = 0.002
"""By how much the share of a model's probabilities that are exactly 1 may rise under the plan."""

FIRST_STEPS = 4
"""If the later steps do not decide, losses are judged by the first steps: at least this many."""

FIRST_STEPS_MARGIN = 0.25
"""By how much the plan's loss may differ from bare's in the first steps, in seed-to-seed standard
deviations. Less is allowed than in later steps, because updates let differences grow."""

LOWER_MARGINS = 6.0
"""A plan fails if it lowers the loss by more than this many margins: it must be training something
else."""

SPIKE_DEVIATIONS = 6.0
"""A spike exceeds bare's loss by more than this many of bare's seed-to-seed standard deviations."""

SPIKE_FACTOR = 2.0
"""A spike must also exceed bare's loss by more than this many times the largest excess of a bare
loss over the mean of the other seeds."""

ROUNDING = 1e-6
"""Differences below this fraction of a value do not count. The fraction is a few units in the last
place of float32 (2**-23 = 1.2e-7)."""

MOMENT_MARGINS = 6.0
"""No mean or RMS of a tensor may move by more than this many seed-to-seed standard deviations."""

MOMENT_CHANGE = 0.1
"""``MOMENT_MARGINS`` applies only to changes above this fraction of the tensor's RMS."""

LEAST_SPREAD = 0.01
"""Lower bound on the seed-to-seed standard deviation of a mean or RMS, as a fraction of the
tensor's RMS. It is used if seeds change the mean or RMS: a few seeds can underestimate the
deviation."""

UNKNOWN_SPREAD = 0.05
"""The same lower bound if seeds do not change the mean or RMS."""

OUTPUT_ERROR = 1e-3
"""Largest relative error that is allowed in outputs for identical inputs, without ``reduced``
settings."""

REDUCED_OUTPUT_ERROR = 2.0**-4
"""The same limit with ``reduced`` settings. One rounding to bfloat16 is a relative error of up to
2**-8; in a deep network, hundreds of such errors add up like a random walk."""

TOP1_AGREEMENT = 0.99
"""At least this share of the clear rows (``CLEAR_LEAD``) must have their largest element at the
same place under the plan as under bare."""

CLEAR_LEAD = 4.0
"""A row of an output is clear if its largest element exceeds the second largest by more than this
many times the root mean square error of the output's elements."""

CURVE_POINTS = 100
"""Maximum number of points of a loss curve in a verdict."""

PLAN_CURVE_POINTS = 20
"""Maximum number of points of a loss curve in a plan's file."""


@dataclass(frozen=True)
class Run:
    """The values that one run computed, as far as they were recorded.

    Attributes:
        curves: the loss curves, see ``extract_curves``.
        steps: the number of steps that the run made.
        trains: whether the program trains.
        gradients: the gradients of the first updates of each parameter; empty if they were not
            recorded.
        outputs: the outputs of the calls that do not train; empty if they were not recorded.
        state: the state of the modules at the end; ``None`` if it was not recorded.
    """

    curves: tuple[Curve, ...]
    steps: int = 0
    trains: bool = True
    gradients: Mapping[str, Sequence[Gradient]] = field(default_factory=dict)
    outputs: Sequence[Output] = ()
    state: tuple[RootState, ...] | None = None

    @classmethod
    def of(cls, process: ProcessRecord) -> Run:
        """Make a run from the record of its process."""
        return cls(
            extract_curves([step for step in process.steps if step.mark != "profiled"]),
            len(process.loop_steps),
            process.trains,
            process.gradients,
            process.outputs,
            process.state,
        )


@dataclass(frozen=True)
class LossCurves:
    """The losses of one backward call, averaged over all seeds and over the steps of each point.

    Attributes:
        steps: the first step of each point.
        bare, plan: the losses of both sides.
        bare_spread, plan_spread: the seed-to-seed standard deviations of these losses.
    """

    steps: tuple[int, ...]
    bare: Curve
    plan: Curve
    bare_spread: Curve
    plan_spread: Curve


@dataclass(frozen=True)
class Verdict:
    """The verdict on a plan.

    Attributes:
        passed: whether the plan computes the same within the margins, that is, whether no check
            failed. The check for growing memory, which ``growth.py`` adds later, does not count.
        why: the reason, as a clause.
        kind: ``"bitwise"`` if everything that was compared is identical; ``"inconclusive"`` if no
            loss has fallen, so that the losses prove little; otherwise ``"non-inferior"``.
        steps: the number of steps that were compared, from the first one on; for a program that
            only infers, the number of calls that were compared.
        bare_repeats: whether bare gave identical results when it ran again from the same seed;
            ``None`` if the program only infers and this was not tested.
        losses: the evidence on the losses of each backward call of the step.
        checks: all checks. If any failed, ``why`` is the reason of the first that failed.
        curves: the loss curves of each backward call of the step.
        seeds: the number of seeds from which bare and plan were run.
    """

    passed: bool
    why: str
    kind: str
    steps: int
    bare_repeats: bool | None
    losses: tuple[LossEvidence, ...]
    checks: tuple[Check, ...] = ()
    curves: tuple[LossCurves, ...] = ()
    seeds: int = 1

    @property
    def undecided(self) -> bool:
        """Whether the plan failed only because confidence limits are far from the means, so that
        more seeds may decide."""
        failed = [check for check in self.checks if check.result == "failed"]
        return bool(failed) and all(check.undecided for check in failed)


def extract_curves(steps: Sequence[Step]) -> tuple[Curve, ...]:
    """Extract the loss curves of a run, one for each backward call of the step.

    A step is left out if its number of backward calls is not the most common one. A backward call
    is kept only if its loss could be read in all of the steps that are kept.
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


def collect_exactness(settings: Mapping[str, str]) -> frozenset[Exactness]:
    """Collect the exactness classes of settings, which tell what they may change.

    Raises:
        UnknownSettingError: there is no such knob.
    """
    return frozenset(knobs.get(name).exactness[setting] for name, setting in settings.items())


def judge(
    bare: Sequence[Run],
    plan: Sequence[Run],
    repeats: Sequence[Run],
    exactness: Collection[Exactness],
) -> Verdict:
    """Compare bare and plan.

    Args:
        bare, plan: one run for each seed, in the same order of seeds, at least one.
        repeats: additional bare runs from the first seed, if any. Their number of steps may differ.
        exactness: the exactness classes of the plan's settings, see ``collect_exactness``.
    """
    if not any(run.trains for run in bare):
        return _judge_inference(bare, plan, repeats, exactness)
    steps = min((len(curve) for run in (*bare, *plan) for curve in run.curves), default=0)
    is_repeated = bool(repeats) and all(_are_identical(bare[0], run) for run in repeats)
    why = _find_mismatch(bare, plan, steps)
    if why is not None:
        return Verdict(
            passed=False,
            why=why,
            kind="non-inferior",
            steps=steps,
            bare_repeats=is_repeated,
            losses=(),
            checks=(Check("losses", "failed", why),),
            seeds=len(bare),
        )
    same = all(_are_identical(one, other) for one, other in zip(bare, plan, strict=True))
    losses, checks = _judge_sites(bare, plan, repeats, steps)
    if set(exactness) <= {"bitwise"}:
        checks.append(_judge_identity(bare, plan, same, is_repeated))
    elif any(run.gradients for run in bare):
        of_bare, of_plan = ([run.gradients for run in runs] for runs in (bare, plan))
        checks.append(gradients.judge(of_bare, of_plan, exactness))
    checks += _judge_evaluation(bare, plan, exactness)
    checks.append(_judge_state(bare, plan))
    checks += _judge_probabilities(bare, plan)
    open_losses = next((c for c in checks if c.name == "losses" and c.result == "open"), None)
    if same or any(c.name == "losses" and c.result == "passed" for c in checks):
        open_losses = None
    why = "all losses agree" if open_losses is None else open_losses.why
    return Verdict(
        passed=all(check.result != "failed" for check in checks),
        why=next((c.why for c in checks if c.result == "failed"), why),
        kind="bitwise" if same else "non-inferior" if open_losses is None else "inconclusive",
        steps=steps,
        bare_repeats=is_repeated,
        losses=losses,
        checks=tuple(checks),
        curves=tuple(
            _mean_curves(
                [run.curves[site][:steps] for run in bare],
                [run.curves[site][:steps] for run in plan],
                CURVE_POINTS,
            )
            for site in range(len(bare[0].curves))
        ),
        seeds=len(bare),
    )


def _find_mismatch(bare: Sequence[Run], plan: Sequence[Run], steps: int) -> str | None:
    """Return the reason why the losses of runs cannot be compared, as a clause, if any."""
    sites = len(bare[0].curves)
    if not sites or not steps:
        return "no loss could be read"
    if any(len(run.curves) != sites for run in (*bare, *plan)):
        return "the plan changes the number of backward calls of a step"
    return None


def have_same_data(one: Run, other: Run) -> bool:
    """Return whether the losses of two runs rise and fall together from step to step.

    If both runs have the same batches, a hard batch raises the losses of both, whatever else is
    random. The differences of successive losses are compared rather than the losses, which share a
    trend in all runs.
    """
    for curves in zip(one.curves, other.curves, strict=False):
        jumps = [[after - before for before, after in pairwise(curve)] for curve in curves]
        length = min(map(len, jumps))
        of_one, of_other = (jump[length // 4 : length] for jump in jumps)
        if len(of_one) > 2 and stdev(of_one) > 0 and stdev(of_other) > 0:
            return correlation(of_one, of_other) > SAME_DATA
    return True


def _are_identical(one: Run, other: Run) -> bool:
    """Return whether two runs have the same losses in the steps that both have.

    If both runs have equally many steps and recorded their weights, the weights must be the same as
    well.
    """
    if len(one.curves) != len(other.curves):
        return False
    shared = min((len(c) for run in (one, other) for c in run.curves), default=0)
    for of_one, of_other in zip(one.curves, other.curves, strict=True):
        if of_one[:shared] != of_other[:shared]:
            return False
    digests = [None if run.state is None else [r.digest for r in run.state] for run in (one, other)]
    return None in digests or one.steps != other.steps or digests[0] == digests[1]


def _judge_identity(
    bare: Sequence[Run], plan: Sequence[Run], same: bool, is_repeated: bool
) -> Check:
    """Judge whether losses and weights are bitwise identical.

    Args:
        bare, plan: see ``judge``.
        same: whether losses, and weights where they were recorded, are bitwise identical.
        is_repeated: whether bare gave identical losses twice from one seed.
    """
    if same:
        weighed = all(run.state is not None for run in (*bare, *plan))
        what = "losses and weights are" if weighed else "all losses are"
        return Check("identity", "passed", f"{what} identical to the bit")
    if not is_repeated:
        return Check(
            "identity",
            "open",
            "the losses are not identical: identity cannot be proven, because bare does not repeat "
            "itself",
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


def _judge_sites(
    bare: Sequence[Run], plan: Sequence[Run], repeats: Sequence[Run], steps: int
) -> tuple[tuple[LossEvidence, ...], list[Check]]:
    """Judge the losses of each backward call of the step, over the steps that all runs have.

    Args:
        bare, plan, repeats: see ``judge``; all bare and plan runs have the same number of curves.
        steps: the number of steps that all runs have.
    """
    sites = len(bare[0].curves)
    losses: list[LossEvidence] = []
    checks: list[Check] = []
    for site in range(sites):
        evidence, found = _judge_site(
            "the loss" if sites == 1 else f"loss {site + 1} of {sites}",
            [run.curves[site][:steps] for run in bare],
            [run.curves[site][:steps] for run in plan],
            [run.curves[site][:steps] for run in repeats if len(run.curves) == sites],
        )
        checks += found
        if evidence is not None:
            losses.append(evidence)
    return tuple(losses), checks


def _judge_site(
    name: str, bare: Sequence[Curve], plan: Sequence[Curve], repeats: Sequence[Curve]
) -> tuple[LossEvidence | None, list[Check]]:
    """Judge the losses of one backward call.

    Returns the evidence and the checks. There is no evidence if a loss is not finite.
    """
    for whose, runs in (("bare", bare), ("the plan", plan)):
        for run in runs:
            for number, value in enumerate(run):
                if not math.isfinite(value):
                    why = f"{name} is not finite at step {number} under {whose}"
                    return None, [Check("spikes", "failed", why)]
    by_seeds = _seeds_matter(bare, repeats)
    differing_repeats = [curve for curve in repeats if _distance(curve, bare[0]) > 0]
    evidence, check = _judge_losses("losses", name, bare, plan, by_seeds, differing_repeats)
    if check.result == "passed" and not _has_fallen(bare, evidence.margin):
        begun, ended = _level(bare, _beginning(bare)), evidence.bare_final
        why = (
            f"{name} did not fall within {len(bare[0])} steps (from {begun:.4g} to {ended:.4g}), "
            "so losses that agree with bare's prove little"
        )
        check = Check("losses", "open", why, {**check.measurements, "fall": begun - ended})
    return evidence, [_judge_spikes(name, bare, plan, by_seeds, differing_repeats), check]


def _beginning(curves: Sequence[Curve]) -> range:
    return range(max(int(len(curves[0]) * BEGINNING_SHARE), 1))


def _level(curves: Sequence[Curve], part: range) -> float:
    return fmean(_means(curves, part))


def _has_fallen(bare: Sequence[Curve], margin: float) -> bool:
    """Return whether bare's loss falls by more than the margin, and by more than noise explains.

    If it does, the loss of a plan that learns nothing would exceed bare's by more than the margin.
    Only then does it mean something that a plan passes.
    """
    steps, beginning = len(bare[0]), _beginning(bare)
    fall = _level(bare, beginning) - _level(bare, range(steps - max(steps // 4, 1), steps))
    noise = _batch_scatter(bare[0]) / math.sqrt(len(beginning) * len(bare))
    return fall > max(margin, FALL_DEVIATIONS * noise)


def _judge_losses(
    check: str,
    name: str,
    bare: Sequence[Curve],
    plan: Sequence[Curve],
    by_seeds: bool,
    differing_repeats: Sequence[Curve] = (),
    allowed_error: float = 0.0,
) -> tuple[LossEvidence, Check]:
    """Judge one series of losses by paired non-inferiority.

    Args:
        check: the name of the check.
        name: the name of the losses, in words.
        bare, plan: one curve for each seed, all of one length.
        by_seeds: whether seeds change bare's losses.
        differing_repeats: the curves of those additional bare runs from the first seed that differ
            from that seed's first run. If there are any, bare does not repeat itself. These
            curves may have fewer steps; the margin is computed only from curves with all steps.
        allowed_error: the relative error that the plan's settings may cause. If bare's own spread
            is practically zero (at most ``ROUNDING`` times the loss), the margin is this error
            times the loss.
    """
    steps = len(bare[0])
    quarter = max(steps // 4, 1)
    windows = [range(steps // 2, steps), range(steps - quarter, steps)]
    margin_source, margin = "batches", _batch_scatter(bare[0]) / math.sqrt(quarter)
    if by_seeds:
        margin_source, margin = "seeds", _spread(bare, windows)
    elif differing_repeats:
        whole_runs = [*bare, *(curve for curve in differing_repeats if len(curve) == steps)]
        between = _spread(whole_runs, windows) if len(whole_runs) > 1 else 0.0
        if between > margin:
            margin_source, margin = "runs", between
    bare_final, plan_final = (fmean(_means(runs, windows[-1])) for runs in (bare, plan))
    reason = "bare's own spread allows"
    if margin <= ROUNDING * abs(bare_final) and allowed_error:
        reason = "the rounding error of these settings allows"
        margin = allowed_error * abs(bare_final)
    margin += ROUNDING * abs(bare_final)
    limit, difference = max(_upper_limit(bare, plan, part) for part in windows)
    points = _mean_curves(bare, plan, PLAN_CURVE_POINTS)
    evidence = LossEvidence(
        bare_final=bare_final,
        plan_final=plan_final,
        difference=difference,
        margin=margin,
        margin_source=margin_source,
        bare_curve=points.bare,
        plan_curve=points.plan,
    )
    measurements = {"difference": difference, "limit": limit, "margin": margin}
    if limit > margin:
        excess = (
            f"exceeds bare's by {difference:.3g} on average (up to {limit:.3g} with "
            f"{CONFIDENCE:.0%} confidence)"
            if difference > margin
            else f"may exceed bare's by up to {limit:.3g} ({CONFIDENCE:.0%} confidence; "
            f"{difference:+.3g} on average)"
        )
        why = f"{name} {excess}, more than the {margin:.3g} that {reason}"
        # If bare does not repeat itself, the runs are unpaired, so the noise of both means adds up.
        # The check is then undecided as long as the mean difference is below twice the margin.
        is_undecided = difference < (2 * margin if margin_source == "runs" else margin)
        is_close = difference < margin / 2
        if is_undecided and is_close and check == "losses" and margin_source == "seeds":
            beginning = _judge_first_steps(name, bare, plan, why)
            if beginning is not None:
                return evidence, dataclasses.replace(beginning, measurements=measurements)
        return evidence, Check(check, "failed", why, measurements, undecided=is_undecided)
    if limit < -LOWER_MARGINS * margin:
        why = (
            f"{name} is lower by {-difference:.3g} on average, far more than the {margin:.3g} "
            f"that {reason}: the plan appears to be training something else"
        )
        return evidence, Check(check, "failed", why, measurements)
    why = f"{name} exceeds bare's by at most {limit:+.3g}; {reason} {margin:.3g}"
    return evidence, Check(check, "passed", why, measurements)


def _judge_first_steps(
    name: str, bare: Sequence[Curve], plan: Sequence[Curve], why_undecided: str
) -> Check | None:
    """Judge losses by the first steps, after the later steps have not decided.

    In the first steps, the two runs of a pair (bare and plan with one seed) still have nearly the
    same weights, so there is little noise to hide what a setting does to a loss. After many
    updates, the two runs have diverged as far as the runs of two seeds do.

    Args:
        name, bare, plan: see ``_judge_losses``.
        why_undecided: the reason why the later steps do not decide, as a clause.

    Returns the passed check; ``None`` if the first steps do not decide either.
    """
    later, lies_by = _upper_limit(bare, plan, range(len(bare[0]) // 2, len(bare[0])))
    window = _find_first_steps(bare)
    if window is None or 2 * lies_by - later > 0:  # the later losses are higher, beyond noise
        return None
    limit, difference = _upper_limit(bare, plan, window)
    margin = FIRST_STEPS_MARGIN * _spread(bare, [window])
    if limit > margin or 2 * difference - limit < -margin:
        return None
    return Check(
        "losses",
        "passed",
        f"in the first {len(window)} steps, {name} exceeds bare's by at most {limit:+.3g} "
        f"({margin:.3g} is allowed); later steps are too noisy to decide: {why_undecided}",
    )


def _find_first_steps(bare: Sequence[Curve]) -> range | None:
    """Find how many first steps bare's loss takes to fall by more than noise explains.

    As long as the loss has not fallen, updates have hardly acted, and equal losses prove nothing
    about them. The result is ``None`` if the loss does not fall within the first half of the steps.
    """
    size = max(len(bare[0]) // 8, FIRST_STEPS)
    while size <= len(bare[0]) // 2:
        part = max(size // 4, 1)
        fall = _level(bare, range(part)) - _level(bare, range(size - part, size))
        noise = _batch_scatter(bare[0]) / math.sqrt(part * len(bare))
        if fall > FALL_DEVIATIONS * math.sqrt(2) * noise:
            return range(size)
        size *= 2
    return None


def _spread(curves: Sequence[Curve], windows: Sequence[range]) -> float:
    """Return the run-to-run standard deviation of the mean loss in a window, pooled over the
    windows."""
    return math.sqrt(fmean(stdev(_means(curves, part)) ** 2 for part in windows))


def _judge_spikes(
    name: str,
    bare: Sequence[Curve],
    plan: Sequence[Curve],
    by_seeds: bool,
    differing_repeats: Sequence[Curve] = (),
) -> Check:
    """Check that no single loss stands out.

    A loss stands out if it exceeds its reference by more than the allowance of its quarter of the
    steps. Reference and allowance depend on how bare's losses behave:

    - If seeds change the losses, the reference is bare's loss of the same step and seed, or bare's
      mean over all seeds in this step, whichever is higher. The allowance is ``SPIKE_FACTOR`` times
      the largest excess of a bare loss over the mean of the other seeds, or ``SPIKE_DEVIATIONS``
      times bare's standard deviation between seeds, whichever is more.
    - If seeds do not change the losses, the reference is bare's loss of the same step. The
      allowance is computed in the same way, but from bare's jumps from step to step.
    - If bare does not repeat itself, the reference is the highest of three values: the reference
      above, bare's highest loss in the quarter, and the mean of the plan's own losses in this step
      and in the ``steps / 4`` steps before it. Other processes may already have trained the shared
      weights, so the number of a step does not tell how far the training is. The allowance is at
      least the excess of bare's highest loss over bare's mean in the quarter.

    Args:
        name: the name of the losses, in words.
        bare, plan, by_seeds, differing_repeats: see ``_judge_losses``.
    """
    steps = len(bare[0])
    mean, excess, deviation = _describe_scatter(bare, by_seeds)
    bare_runs = [*bare, *differing_repeats]
    quarter = max(-(-steps // 4), 1)
    for start in range(0, steps, quarter):
        part = slice(start, start + quarter)
        pooled_deviation = math.sqrt(fmean(value**2 for value in deviation[part]))
        allowed = max(SPIKE_FACTOR * max(excess[part]), SPIKE_DEVIATIONS * pooled_deviation)
        highest = -math.inf
        if differing_repeats:
            highest = max(max(curve[part], default=highest) for curve in bare_runs)
            allowed = max(allowed, highest - fmean(fmean(c[part]) for c in bare_runs if c[part]))
        for number in range(steps)[part]:
            for of_bare, of_plan in zip(bare, plan, strict=True):
                reference = max(of_bare[number], mean[number], highest)
                if differing_repeats:
                    recent = of_plan[max(number - quarter, 0) : number + 1]
                    reference = max(reference, fmean(recent))
                if of_plan[number] - reference > allowed + ROUNDING * abs(reference):
                    why = (
                        f"{name} stands out at step {number}: {of_plan[number]:.4g} under the "
                        f"plan, {of_bare[number]:.4g} bare"
                    )
                    values = {"plan": of_plan[number], "bare": of_bare[number]}
                    return Check("spikes", "failed", why, {**values, "allowed": allowed})
    return Check("spikes", "passed", f"no single value of {name} stands out")


def _describe_scatter(
    bare: Sequence[Curve], by_seeds: bool
) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """Describe how bare's losses scatter in each step, for ``_judge_spikes``.

    Args:
        bare: one curve for each seed, all of one length.
        by_seeds: whether seeds change bare's losses; if so, there are at least two curves.

    Returns, for each step, the mean over the seeds, the largest excess of a loss over the mean of
    the other seeds, and the standard deviation between seeds. If seeds do not change the losses,
    the mean is the loss itself, and the other two values are ``abs(next loss - loss) / sqrt(2)``.
    """
    if not by_seeds:
        jumps = [abs(after - before) / math.sqrt(2) for before, after in pairwise(bare[0])]
        jumps = [*jumps, *jumps[-1:]] or [0.0]
        return bare[0], jumps, jumps
    by_step = list(zip(*bare, strict=True))
    # A loss is this many times as far from the mean of the other seeds as from the mean of all.
    leave_one_out_factor = len(bare) / (len(bare) - 1)
    means = [fmean(values) for values in by_step]
    excesses = [
        leave_one_out_factor * max(value - mean for value in values)
        for values, mean in zip(by_step, means, strict=True)
    ]
    return means, excesses, [stdev(values) for values in by_step]


def _seeds_matter(bare: Sequence[Curve], repeats: Sequence[Curve]) -> bool:
    """Return whether a different seed changes bare's losses by far more than a repeat from the same
    seed does."""
    if len(bare) < 2:
        return False
    first = bare[0]
    noise = max((_distance(first, curve) for curve in repeats), default=0.0)
    return min(_distance(first, curve) for curve in bare[1:]) > 4 * noise


def _distance(one: Curve, other: Curve) -> float:
    """Return the root mean square difference over the steps that both curves have."""
    squares = [(a - b) ** 2 for a, b in zip(one, other, strict=False)]
    return math.sqrt(fmean(squares)) if squares else 0.0


def _batch_scatter(curve: Curve) -> float:
    """Return the standard deviation of a loss around its trend.

    The deviation is computed from the differences of successive steps.
    """
    jumps = [after - before for before, after in pairwise(curve)]
    return stdev(jumps) / math.sqrt(2) if len(jumps) > 1 else 0.0


def _means(runs: Sequence[Curve], part: range) -> list[float]:
    return [fmean(run[part.start : part.stop]) for run in runs]


def _upper_limit(bare: Sequence[Curve], plan: Sequence[Curve], part: range) -> tuple[float, float]:
    """Return the one-sided upper confidence limit of the mean of plan minus bare in a window, and
    this mean."""
    from scipy import stats  # type: ignore[import-untyped]

    differences = [
        of_plan - of_bare
        for of_bare, of_plan in zip(_means(bare, part), _means(plan, part), strict=True)
    ]
    mean = fmean(differences)
    count = len(differences)
    if count < 2:
        return mean, mean
    quantile = float(stats.t.ppf(CONFIDENCE, count - 1))
    return mean + quantile * stdev(differences) / math.sqrt(count), mean


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


# Passes that do not train, and the state at the end of a run


def _judge_evaluation(
    bare: Sequence[Run], plan: Sequence[Run], exactness: Collection[Exactness]
) -> list[Check]:
    """Judge the losses that evaluation passes return, and the mean and RMS of other outputs.

    A loss that does not depend on the seed, such as the loss of a pretrained model before its first
    update, has no spread between seeds. If this loss does not vary between passes either, its
    margin is the relative error that is allowed for outputs on identical inputs
    (``_output_error``). A pass in which the loss of a bare run is not finite is left out.
    """
    calls = min((len(run.outputs) for run in (*bare, *plan)), default=0)
    if not calls:
        return []
    checks: list[Check] = []
    scalars = [[_scalars(run.outputs[:calls]) for run in runs] for runs in (bare, plan)]
    for name in scalars[0][0]:
        of_bare, of_plan = ([run.get(name, ()) for run in runs] for runs in scalars)
        if len({len(run) for run in (*of_bare, *of_plan)}) != 1:
            # The number of passes or outputs depends on the data, so values have no counterparts.
            continue
        of_bare, of_plan = _leave_out_non_finite(of_bare, of_plan)
        if not of_bare[0]:
            continue
        if not all(math.isfinite(value) for run in of_plan for value in run):
            why = f"{name} is not finite in an evaluation pass"
            checks.append(Check("evaluation", "failed", why))
            continue
        by_seeds = any(run != of_bare[0] for run in of_bare)
        _, check = _judge_losses(
            "evaluation",
            name,
            of_bare,
            of_plan,
            by_seeds,
            allowed_error=0.0 if set(exactness) <= {"bitwise"} else _output_error(exactness),
        )
        checks.append(check)
    moments = [[_output_moments(run.outputs[:calls]) for run in runs] for runs in (bare, plan)]
    if any(moments[0]):
        checks.append(_judge_moments("evaluation", "outputs of evaluation passes", *moments))
    return checks


def _leave_out_non_finite(
    bare: Sequence[Curve], plan: Sequence[Curve]
) -> tuple[list[Curve], list[Curve]]:
    """Return the curves without the places at which any bare curve is not finite."""
    values = zip(*bare, strict=True)
    places = [place for place, ours in enumerate(values) if all(map(math.isfinite, ours))]
    of_bare, of_plan = ([tuple(run[i] for i in places) for run in runs] for runs in (bare, plan))
    return of_bare, of_plan


def _scalars(outputs: Sequence[Output]) -> dict[str, Curve]:
    """Collect the scalars that calls return, by module and by place among the module's outputs."""
    found: dict[str, list[float]] = {}
    for output in outputs:
        for place, tensor in enumerate(output.tensors):
            if math.prod(tensor.shape) == 1:
                found.setdefault(f"output {place} of {output.root}", []).append(tensor.mean)
    return {name: tuple(values) for name, values in found.items()}


def _output_moments(outputs: Sequence[Output]) -> Moments:
    """Return the mean and the RMS of each output that is not a scalar, both averaged over the
    second half of the calls."""
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
        sum(module.non_finite for run in runs for module in run.state or ())
        for runs in (bare, plan)
    ]
    if non_finite[1] and not non_finite[0]:
        why = f"{non_finite[1]} elements of weights and buffers are not finite under the plan"
        return Check("state", "failed", why, {"non_finite": non_finite[1]})
    moments = [
        [
            {
                f"{module.root}.{buffer.name}": (buffer.mean, buffer.rms)
                for module in run.state or ()
                for buffer in module.buffers
            }
            for run in runs
        ]
        for runs in (bare, plan)
    ]
    if not any(moments[0]):
        return Check("state", "passed", "all weights are finite; no buffer is floating-point")
    return _judge_moments("state", "buffers", *moments)


def _judge_probabilities(bare: Sequence[Run], plan: Sequence[Run]) -> list[Check]:
    """Judge the share of probabilities that are exactly 1.

    There is no check if no module returns probabilities.
    """
    shares: list[float] = []
    for runs in (bare, plan):
        modules = [module for run in runs for module in run.state or ()]
        count = sum(module.probability_count for module in modules)
        if not count:
            return []
        shares.append(sum(module.saturated_count for module in modules) / count)
    added = shares[1] - shares[0]
    why = f"{shares[1]:.2%} of the probabilities that the model returns are exactly 1"
    if added > MORE_ONES:
        why += (
            f", {shares[0]:.2%} without the plan: a loss that contains log(1 - p) becomes infinite "
            "or is clamped, and the gradients of these probabilities become 0"
        )
        return [Check("probabilities", "failed", why, {"added": added})]
    return [Check("probabilities", "passed", why, {"added": added})]


def _judge_moments(
    check: str, what: str, bare: Sequence[Moments], plan: Sequence[Moments]
) -> Check:
    """Judge the means and RMS of many tensors at once, by how far the plan moves them.

    For the mean and the RMS of each tensor, the difference between plan and bare, averaged over the
    seeds, is divided by bare's seed-to-seed standard deviation. The mean square of these
    quotients, minus what the scatter of so few seeds adds to it, may be at most 1.

    Args:
        check: the name of the check.
        what: the name of the tensors, in words.
        bare, plan: the moments of each run, in the same order of seeds.
    """
    shifts: list[float] = []
    noises: list[float] = []
    for name in bare[0]:
        if not all(name in run for run in (*bare, *plan)):
            continue
        for place, moment in enumerate(("mean", "RMS")):
            of_bare, of_plan = ([run[name][place] for run in runs] for runs in (bare, plan))
            if not all(map(math.isfinite, of_bare)):
                continue
            if not all(map(math.isfinite, of_plan)):
                return Check(
                    check, "failed", f"the {moment} of {name} is not finite under the plan"
                )
            size = max(run[name][1] for run in bare)
            seeds = len(of_bare)
            spread = stdev(of_bare) if seeds > 1 else 0.0
            is_known = spread > ROUNDING * size
            spread = max(spread, (LEAST_SPREAD if is_known else UNKNOWN_SPREAD) * size, ROUNDING)
            differences = [b - a for a, b in zip(of_bare, of_plan, strict=True)]
            shift = fmean(differences)
            noise = stdev(differences) / math.sqrt(seeds) if seeds > 1 else 0.0
            shifts.append(shift / spread)
            noises.append(noise / spread)
            is_beyond = abs(shift) - 3 * noise > MOMENT_MARGINS * spread
            if is_beyond and abs(shift) > MOMENT_CHANGE * size:
                means = {"bare": fmean(of_bare), "plan": fmean(of_plan)}
                why = (
                    f"the {moment} of {name} goes from {means['bare']:.4g} to {means['plan']:.4g} "
                    "under the plan"
                )
                return Check(check, "failed", why, means)
    if not shifts:
        return Check(check, "open", f"bare and plan have no {what} in common")
    power = fmean(value**2 for value in shifts) - fmean(value**2 for value in noises)
    moved = math.sqrt(max(power, 0.0))
    why = f"typically, the {what} shift by {moved:.2g} of bare's seed-to-seed standard deviations"
    measurements = {"deviations": moved, "compared": float(len(shifts))}
    return Check(check, "passed" if moved <= 1 else "failed", why, measurements)


# Inference


def _judge_inference(
    bare: Sequence[Run],
    plan: Sequence[Run],
    repeats: Sequence[Run],
    exactness: Collection[Exactness],
) -> Verdict:
    recorded = [run for run in repeats if run.outputs]
    is_repeated = all(_same_outputs([bare[0]], [run]) for run in recorded) if recorded else None
    same = _same_outputs(bare, plan)
    check, calls = _judge_outputs(bare, plan, exactness)
    checks = [check]
    if set(exactness) <= {"bitwise"}:
        if same:
            checks.append(Check("identity", "passed", "all outputs are identical to the bit"))
        elif is_repeated:
            checks.insert(0, Check("identity", "failed", "the outputs are not identical"))
        else:
            reason = (
                "because bare does not repeat itself"
                if is_repeated is False
                else "because it was not tested whether bare repeats itself"
            )
            why = f"the outputs differ: identity cannot be proven, {reason}"
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
        seeds=len(bare),
    )


def _same_outputs(one: Sequence[Run], other: Sequence[Run]) -> bool:
    """Return whether all outputs with a digest, and their inputs, are identical on both sides.

    There must be at least one such output, and equally many on both sides. ``Inspection.outputs``
    limits the number of outputs with a digest.
    """
    sides = [
        [(o.inputs, o.digest) for run in runs for o in run.outputs if o.digest is not None]
        for runs in (one, other)
    ]
    return bool(sides[0]) and sides[0] == sides[1]


def _output_error(exactness: Collection[Exactness]) -> float:
    """Return the relative error that outputs for identical inputs may have, given the classes of
    the settings."""
    return REDUCED_OUTPUT_ERROR if "reduced" in exactness else OUTPUT_ERROR


def _judge_outputs(
    bare: Sequence[Run], plan: Sequence[Run], exactness: Collection[Exactness]
) -> tuple[Check, int]:
    """Judge the relative error and the top-1 agreement of outputs for identical inputs.

    The relative error is the Euclidean norm of the differences of the sampled elements, divided by
    the norm of bare's elements.

    Returns the check, and the number of calls with identical inputs.
    """
    import numpy as np

    limit = _output_error(exactness)
    calls = rows = agreeing = clear = clear_agreeing = 0
    worst = 0.0
    for bare_run, plan_run in zip(bare, plan, strict=True):
        for of_bare, of_plan in zip(bare_run.outputs, plan_run.outputs, strict=False):
            if of_bare.inputs is None or of_bare.inputs != of_plan.inputs:
                continue
            shapes = [[tensor.shape for tensor in o.tensors] for o in (of_bare, of_plan)]
            if shapes[0] != shapes[1]:
                why = f"the outputs of {of_bare.root} have different sizes under the plan"
                return Check("outputs", "failed", why), calls
            if not of_bare.tensors and of_bare.digest != of_plan.digest:
                why = f"the non-floating outputs of {of_bare.root} differ under the plan"
                return Check("outputs", "failed", why), calls
            calls += 1
            for a, b in zip(of_bare.tensors, of_plan.tensors, strict=True):
                if a.sample is None or b.sample is None:
                    continue
                x, y = (np.asarray(t.sample, dtype=np.float64) for t in (a, b))
                if not np.isfinite(x).all():
                    # Bare's output itself is not finite (masked logits, for example), so there is
                    # no relative error.
                    continue
                difference = float(np.linalg.norm(y - x))
                size = float(np.linalg.norm(x))
                if not math.isfinite(difference):
                    why = f"an output of {of_bare.root} is not finite under the plan"
                    return Check("outputs", "failed", why), calls
                error = difference / size if size else float(difference > 0)
                worst = max(worst, error)
                if a.top1 is not None and b.top1 is not None and a.lead is not None:
                    agree = np.asarray(a.top1) == np.asarray(b.top1)
                    leads = np.asarray(a.lead) > CLEAR_LEAD * difference / math.sqrt(len(x))
                    rows += len(agree)
                    agreeing += int(agree.sum())
                    clear += int(leads.sum())
                    clear_agreeing += int((agree & leads).sum())
    if not calls:
        why = "no call had identical inputs on both sides"
        return Check("outputs", "failed", why), 0
    measurements = {"relative_error": worst, "error_limit": limit, "calls": float(calls)}
    why = f"on identical inputs the outputs of {calls} calls differ by at most {worst:.2g}"
    passed = worst <= limit
    why += f" of their size (limit {limit:.2g})"
    if rows:
        measurements |= {"top1_agreement": agreeing / rows, "top1_rows": float(rows)}
        why += f"; the largest element is the same in {agreeing / rows:.2%} of {rows} rows"
        if clear and clear_agreeing / clear < TOP1_AGREEMENT:
            passed = False
            why += f", and in {clear_agreeing / clear:.2%} of the rows where it leads clearly"
    return Check("outputs", "passed" if passed else "failed", why, measurements), calls
