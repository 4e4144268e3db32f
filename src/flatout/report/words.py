"""Puts what a tune found into words: the lines that it ends with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from flatout.plan import LossEvidence
from flatout.text import printable
from flatout.tune import formatting, memory, pairs, unwatched
from flatout.tune.document import (
    Document,
    KnobResult,
    ProofResult,
    QuietnessResult,
    Side,
    TriedSettings,
)
from flatout.wire.ratios import Ratio

MARGIN_SOURCES = {"seeds": "between seeds", "batches": "between batches", "runs": "between runs"}

LIKE_THE_CLAIM = 0.03
"""Ratios that differ from the claim by less than this fraction are not told apart from it."""

_STAGES = {"inside one process": "inside one process", "fresh processes": "in fresh processes"}

_LARGEST_BOUND = 10.0
"""A bound above this is not said: almost the whole step could go, which tells nothing."""

_NOT_IN_PLAN = ("slower", "no gain", "failed", "left out", "not tried")
"""The states of settings that are not in the plan, in the order in which they are listed."""


def lines(document: Document, verbose: bool = False) -> list[str]:
    """The result in lines: the verdict, the plan or why there is none, and what to do next.

    Args:
        document: the result.
        verbose: add each check of the proof, how to do by hand what the plan does, and each setting
            that is not in the plan with its reason.
    """
    said: list[str] = []
    if document.plan is None:
        said.append(f"no plan written: {document.why}")
        said.append(f"bare: {formatting.milliseconds(document.baseline.step_ms)} a step")
    else:
        said.append(claim_line(document))
        said += filter(None, [compare_parts(document.baseline, document.with_plan or Side())])
        said += filter(None, [unwatched.describe(document.unwatched_factor)])
        said += _describe_unlike(document)
    if document.proof is not None:
        said += proof_lines(document.proof, verbose)
    if document.plan is not None:
        said.append(f"the plan, in {document.plan}, and what each knob does:")
        for knob in document.knobs:
            said += _knob(knob, verbose)
        said += _sides(document.baseline, document.with_plan or Side())
        even = break_even(document)
        said += [] if even is None else [f"break-even: {even}"]
    said += _not_in_plan(document.tried, verbose)
    said = [" ".join(line.splitlines()) for line in said]
    if document.next_command is not None:
        said.append(f"next: {document.next_command}")  # line ends in it are part of the command
    return [printable(line) for line in said]


def state(entry: TriedSettings) -> str:
    """What became of an entry, in a word or two."""
    is_slower = entry.state == "no gain" and entry.ratio is not None and entry.ratio.high < 1
    return "slower" if is_slower else entry.state


def break_even(document: Document) -> str | None:
    """When the plan has saved the time of the tune and of its own longer start.

    Returns ``None`` if the length of the job is not known, since it decides whether that is early.
    """
    steps, bare = document.break_even_steps, document.baseline
    if steps is None or bare.job_s is None or not bare.step_ms:
        return None
    in_steps_s = bare.job_s - (bare.startup_s or 0.0) - (bare.warmup_s or 0.0) - document.unlike_s
    job_steps = round(in_steps_s * 1e3 / bare.step_ms)
    said = f"after {formatting.count(steps, 'step')} of {job_steps:,}, with the time of the tune"
    return said if steps <= job_steps else f"{said}: only if this job runs more than once"


def sides(bare: Side, plan: Side) -> Iterator[tuple[str, str, str, str]]:
    """The rows of a table: what is compared, the bare program, the plan, and the change."""
    rows: list[tuple[str, formatting.Formatter, Callable[..., str], float | None, float | None]] = [
        ("step", formatting.format_milliseconds, formatting.change, bare.step_ms, plan.step_ms),
        (
            "start-up",
            formatting.format_duration,
            formatting.seconds_change,
            bare.startup_s,
            plan.startup_s,
        ),
        (
            "compilation, first steps",
            formatting.format_duration,
            formatting.seconds_change,
            bare.warmup_s,
            plan.warmup_s,
        ),
        (
            "whole job (projected)",
            formatting.format_duration,
            formatting.change,
            bare.job_s,
            plan.job_s,
        ),
        (
            "peak memory",
            formatting.format_memory,
            formatting.change,
            bare.peak_rss_bytes,
            plan.peak_rss_bytes,
        ),
    ]
    device_peak = (bare.peak_device_bytes, plan.peak_device_bytes)
    if device_peak != (None, None):
        rows.append(
            ("peak device memory", formatting.format_memory, formatting.change, *device_peak)
        )
    for name, formatter, changed, of_bare, of_plan in rows:
        yield (
            name,
            formatting.text(formatter, of_bare),
            formatting.text(formatter, of_plan),
            changed(formatter, of_bare, of_plan),
        )


def verdict(proof: ProofResult) -> str:
    """The result of a proof, in a word or two."""
    return {True: "passed", False: "not passed", None: "inconclusive"}[proof.passed]


def what_passed(proof: ProofResult) -> str | None:
    """The checks that an inconclusive proof passed; ``None``: there are none, or it is decided."""
    names = dict.fromkeys(check.name for check in proof.checks if check.passed)
    if proof.passed is not None or not names:
        return None
    return f"passed only: {', '.join(names)}"


def _proof_headline(proof: ProofResult) -> str:
    """The verdict, with the steps and seeds that it covers."""
    kind = f" ({proof.kind})" if proof.passed is not None else ""
    only = what_passed(proof)
    return (
        f"{verdict(proof)}{kind} over {formatting.count(proof.steps, 'step')}, "
        f"{formatting.count(proof.seeds, 'seed')}: {proof.why}{f'; {only}' if only else ''}"
    )


def repeatability(proof: ProofResult) -> str | None:
    """A note if the bare program does not repeat its own losses."""
    if proof.bare_repeats is not False:
        return None
    return "the bare program does not repeat its own losses from one seed"


def _loss(loss: LossEvidence, proof: ProofResult) -> str:
    """Compare the losses of one backward call."""
    compared = (
        ", identical at every step"
        if proof.kind == "bitwise" and proof.passed
        else f" (difference {formatting.signed(loss.difference)}; bare's own spread "
        f"{MARGIN_SOURCES.get(loss.margin_source, loss.margin_source)} allows {loss.margin:.2g})"
    )
    return (
        f"{formatting.loss(loss.bare_final)} bare, {formatting.loss(loss.plan_final)} with the plan"
        f"{compared}"
    )


def _ratio(measured: Ratio | None) -> str:
    """A ratio with its interval and number of pairs."""
    return formatting.NOT_MEASURED if measured is None else str(measured)


def _knob(knob: KnobResult, verbose: bool) -> list[str]:
    said = [f"  {knob.knob} = {knob.setting} ({knob.summary})"]
    if verbose:
        in_process, on_top = _ratio(knob.in_process), _ratio(knob.gain_on_top)
        said.append(f"    gain inside one process: {in_process}; on top of the others: {on_top}")
        if knob.predicted is not None:
            said.append(f"    {prediction(knob.predicted)} by replaying the calls of a step")
        said.append(f"    by hand: {knob.by_hand}")
    return said


def claim_line(document: Document) -> str:
    """The claimed speedup, in a line."""
    claim = document.claim
    if claim is None:
        why = None if document.quietness is None else document.quietness.why_not_measurable
        return f"faster: {why or formatting.NOT_MEASURED}"
    bare_ms = document.baseline.step_ms
    plan_ms = None if document.with_plan is None else document.with_plan.step_ms
    times = ""
    if bare_ms is not None and plan_ms is not None:
        times = (
            f"{formatting.milliseconds(bare_ms)} a step bare, "
            f"{formatting.milliseconds(plan_ms)} with the plan, "
        )
    return (
        f"{formatting.describe_ratio(claim)}: {claim.value:.2f}x ({claim.low:.2f} to "
        f"{claim.high:.2f} with 95 % confidence), {times}{claim.pairs} pairs of fresh processes"
        f"{_beside_other_work(document.quietness)}"
    )


def _beside_other_work(quietness: QuietnessResult | None) -> str:
    """Say how far other work has disturbed a claim; nothing if it has not."""
    if quietness is None or quietness.quiet_share == 1:
        return ""
    return f"; {other_work(quietness)}"


def other_work(quietness: QuietnessResult) -> str:
    """What others took of the CPUs while the pairs of a claim ran."""
    taken = quietness.others_share
    others = formatting.NOT_MEASURED if taken is None else f"{taken:.0%} of the CPUs"
    return (
        f"taken by others: {others}; {quietness.quiet_share:.0%} of the blocks of steps were "
        "undisturbed, and these count"
    )


def compare_parts(bare: Side, plan: Side) -> str | None:
    """What the plan does to the median step, and to the evaluation passes between the steps.

    The result is ``None`` if neither differs much from the claim (``LIKE_THE_CLAIM``).
    """
    if not (bare.step_ms and plan.step_ms and bare.median_step_ms and plan.median_step_ms):
        return None
    claim = bare.step_ms / plan.step_ms
    median = bare.median_step_ms / plan.median_step_ms
    ratios = [("speedup of the median step, without evaluations between steps", median)]
    of_bare, of_plan = bare.phases_ms.get("evaluation"), plan.phases_ms.get("evaluation")
    if of_bare and of_plan:
        ratios.append(("evaluation passes between the steps", of_bare / of_plan))
    if all(abs(ratio / claim - 1) < LIKE_THE_CLAIM for _, ratio in ratios):
        return None
    return "; ".join(f"{name}: {ratio:.2f}x" for name, ratio in ratios)


def _describe_unlike(document: Document) -> list[str]:
    """What part of the job the claim says nothing of; nothing if it covers the whole job."""
    job_s = document.baseline.job_s
    if not document.unlike_s or job_s is None:
        return []
    return [
        f"this speedup does not cover the whole job: {formatting.duration(document.unlike_s)} of "
        f"{formatting.duration(job_s)} are in steps that take at least {pairs.UNLIKE_FACTOR:g} "
        "times as long as those compared"
    ]


def _sides(baseline: Side, with_plan: Side) -> list[str]:
    unknown = (formatting.NOT_MEASURED, formatting.NOT_MEASURED)
    measured = [row for row in sides(baseline, with_plan) if row[1:3] != unknown]
    rows = [("", "bare", "with the plan", ""), *measured]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {name:{widths[0]}}  {bare:>{widths[1]}}  {plan:>{widths[2]}}  {change}".rstrip()
        for name, bare, plan, change in rows
    ]


def proof_lines(proof: ProofResult, verbose: bool = False) -> list[str]:
    """The verdict of a proof and each check that failed; if ``verbose``, all checks and losses."""
    said = [f"proof: {_proof_headline(proof)}"]
    for check in proof.checks:
        if verbose or check.passed is False or check.name == memory.CHECK_NAME:
            result = {True: "passed", False: "NOT PASSED", None: "open"}[check.passed]
            said.append(f"  {check.name}: {result}" + (f", {check.why}" if check.why else ""))
    for number, evidence in enumerate(proof.losses if verbose or not proof.passed else (), 1):
        which = f" {number}" if len(proof.losses) > 1 else ""
        said.append(
            f"loss{which} over the last quarter of {proof.steps} steps: {_loss(evidence, proof)}"
        )
    note = repeatability(proof)
    return said if note is None else [*said, f"note: {note}"]


def _not_in_plan(entries: Sequence[TriedSettings], verbose: bool) -> list[str]:
    """Count the settings that are not in the plan; if ``verbose``, list them with their reasons.

    Settings that need a larger budget to be tried are always listed.
    """
    counts = Counter(map(state, entries))
    counted = ", ".join(f"{counts[name]} {name}" for name in _NOT_IN_PLAN if counts[name])
    if not counted:
        return []
    said = [f"not in the plan: {counted}"]
    if not verbose:
        said[0] += " (-v lists them with their reasons, so does 'flatout report')"
    for name in _NOT_IN_PLAN:
        for entry in entries:
            wants_budget = entry.state == "not tried" and entry.stage == "fresh processes"
            if state(entry) == name and (verbose or wants_budget):
                said.append(f"  {entry.label}: {_outcome(entry)}")
    return said


def prediction(predicted: Ratio) -> str:
    """A predicted ratio with its interval."""
    return f"predicted {predicted.value:.2f}x ({predicted.low:.2f} to {predicted.high:.2f})"


def _outcome(entry: TriedSettings) -> str:
    """What became of an entry: prediction, ratio, state, reason, and the most that the profile
    allows."""
    figure = "" if entry.ratio is None else f"{entry.ratio} {_STAGES[entry.stage]}, "
    if entry.predicted is not None:
        measured = f"measured {figure}" if figure else ""
        figure = f"{prediction(entry.predicted)}, {measured}"
    why = f": {entry.why}" if entry.why else ""
    bound = ""
    if entry.bound is not None and entry.bound < _LARGEST_BOUND:
        bound = f" (at most {entry.bound:.2f}x)"
    return f"{figure}{state(entry)}{why}{bound}"
