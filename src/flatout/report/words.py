"""What a tune found, in words: the last lines that it says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flatout.plan import LossEvidence
from flatout.text import printable
from flatout.tune import figures
from flatout.tune.document import Arm, Document, KnobResult, Proof, Side
from flatout.wire.ratios import Ratio

ARMS_SHOWN = 12
"""Of each kind; the page has them all."""

YARDSTICKS = {"seeds": "between seeds", "batches": "between batches", "runs": "between runs"}

_STAGES = {"inside one process": "inside one process", "fresh processes": "in fresh processes"}

_DID_NOT_HELP = ("no gain", "failed")
_NOT_TRIED = ("not tried", "left out")


def lines(document: Document) -> list[str]:
    """The result: the plan or why there is none, what it brought, its proof, what to do next."""
    said: list[str] = []
    if document.plan is None:
        said.append(f"no plan written: {document.why}")
        said.append(f"bare: {figures.milliseconds(document.baseline.step_ms)} a step")
    else:
        said.append(f"the plan, in {document.plan}:")
        for knob in document.knobs:
            said += _knob(knob)
        said.append(claim_line(document))
        said += _sides(document.baseline, document.with_plan or Side())
        said.append(f"break-even: {break_even(document)}")
    if document.proof is not None:
        said += proof_lines(document.proof)
    said += _arms("tried, and no help:", document.arms, _DID_NOT_HELP)
    said += _arms("not tried:", document.arms, _NOT_TRIED)
    said = [" ".join(line.splitlines()) for line in said]
    if document.next_command is not None:
        said.append(f"next: {document.next_command}")  # line ends in it are part of the command
    return [printable(line) for line in said]


def _ratio(measured: Ratio | None) -> str:
    """A ratio with its interval and pairs."""
    return figures.NOT_MEASURED if measured is None else str(measured)


def break_even(document: Document) -> str:
    """When the plan has made up for its longer start."""
    steps = document.break_even_steps
    if steps is None:
        return figures.NOT_MEASURED
    return "from the first step on" if steps <= 0 else f"after {figures.count(steps, 'step')}"


def sides(bare: Side, plan: Side) -> Iterator[tuple[str, str, str, str]]:
    """Rows of a table: what, the bare program, with the plan, change."""
    rows: list[tuple[str, figures.Kind, Callable[..., str], float | None, float | None]] = [
        ("step", figures.shown_milliseconds, figures.change, bare.step_ms, plan.step_ms),
        ("start-up", figures.shown_duration, figures.longer, bare.startup_s, plan.startup_s),
        (
            "compilation, first steps",
            figures.shown_duration,
            figures.longer,
            bare.warmup_s,
            plan.warmup_s,
        ),
        ("whole job (projected)", figures.shown_duration, figures.change, bare.job_s, plan.job_s),
        (
            "peak memory",
            figures.shown_memory,
            figures.change,
            bare.peak_rss_bytes,
            plan.peak_rss_bytes,
        ),
    ]
    device_peak = (bare.peak_device_bytes, plan.peak_device_bytes)
    if device_peak != (None, None):
        rows.append(("peak device memory", figures.shown_memory, figures.change, *device_peak))
    for name, kind, changed, of_bare, of_plan in rows:
        yield (
            name,
            figures.text(kind, of_bare),
            figures.text(kind, of_plan),
            changed(kind, of_bare, of_plan),
        )


def verdict(proof: Proof) -> str:
    """The result of a proof, in its own word."""
    return {True: "passed", False: "not passed", None: "inconclusive"}[proof.passed]


def what_passed(proof: Proof) -> str | None:
    """Of an inconclusive proof, the checks that passed all the same."""
    names = dict.fromkeys(check.name for check in proof.checks if check.passed)
    if proof.passed is not None or not names:
        return None
    return f"passed only: {', '.join(names)}"


def _proof_headline(proof: Proof) -> str:
    """The verdict with its horizon."""
    kind = f" ({proof.kind})" if proof.passed is not None else ""
    only = what_passed(proof)
    return (
        f"{verdict(proof)}{kind} over {figures.count(proof.steps, 'step')}, "
        f"{figures.count(proof.seeds, 'seed')}: {proof.why}{f'; {only}' if only else ''}"
    )


def repeatability(proof: Proof) -> str | None:
    """What to know about the bare program where it does not repeat itself."""
    if proof.bare_repeats is not False:
        return None
    return "the bare program does not repeat its own losses from one seed"


def _loss(loss: LossEvidence, proof: Proof) -> str:
    """How the losses of one backward call compare."""
    compared = (
        ", identical at every step"
        if proof.kind == "bitwise" and proof.passed
        else f" (difference {figures.signed(loss.difference)}; bare's own spread "
        f"{YARDSTICKS.get(loss.yardstick, loss.yardstick)} allows {loss.margin:.2g})"
    )
    return (
        f"{figures.loss(loss.bare_final)} bare, {figures.loss(loss.plan_final)} with the plan"
        f"{compared}"
    )


def _outcome(arm: Arm) -> str:
    """What came of an arm and why, without its ratio."""
    return arm.state + (f": {arm.why}" if arm.why else "")


def _knob(knob: KnobResult) -> list[str]:
    alone, on_top = _ratio(knob.alone), _ratio(knob.without_it)
    return [
        f"  {knob.knob} = {knob.setting}: {knob.summary}",
        f"    brought, alone: {alone}; on top of the others: {on_top}",
        f"    by hand: {knob.by_hand}",
    ]


def claim_line(document: Document) -> str:
    """The ratio from fresh processes."""
    claim = document.claim
    if claim is None:
        return f"faster: {figures.NOT_MEASURED}"
    bare_ms = document.baseline.step_ms
    plan_ms = None if document.with_plan is None else document.with_plan.step_ms
    times = ""
    if bare_ms is not None and plan_ms is not None:
        times = (
            f"{figures.milliseconds(bare_ms)} a step bare, {figures.milliseconds(plan_ms)} with "
            "the plan, "
        )
    return (
        f"{figures.verdict(claim)}: {claim.value:.2f}x ({claim.low:.2f} to {claim.high:.2f} with "
        f"95 % confidence), {times}{claim.pairs} pairs of fresh processes"
    )


def _sides(baseline: Side, with_plan: Side) -> list[str]:
    rows = [("", "bare", "with the plan", ""), *sides(baseline, with_plan)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {name:{widths[0]}}  {bare:>{widths[1]}}  {plan:>{widths[2]}}  {change}".rstrip()
        for name, bare, plan, change in rows
    ]


def proof_lines(proof: Proof) -> list[str]:
    """The verdict, its checks and the losses."""
    said = [f"proof: {_proof_headline(proof)}"]
    for check in proof.checks:
        result = {True: "passed", False: "NOT PASSED", None: "open"}[check.passed]
        said.append(f"  {check.name}: {result}" + (f", {check.why}" if check.why else ""))
    for number, evidence in enumerate(proof.losses, 1):
        which = f" {number}" if len(proof.losses) > 1 else ""
        said.append(
            f"loss{which} over the last quarter of {proof.steps} steps: {_loss(evidence, proof)}"
        )
    note = repeatability(proof)
    return said if note is None else [*said, f"note: {note}"]


def _arms(heading: str, arms: Sequence[Arm], states: Sequence[str]) -> list[str]:
    chosen = [arm for arm in arms if arm.state in states]
    said = [heading] if chosen else []
    for arm in chosen[:ARMS_SHOWN]:
        figure = "" if arm.ratio is None else f"{arm.ratio} {_STAGES[arm.stage]}, "
        bound = f" (at most {arm.bound:.2f}x)" if arm.bound is not None else ""
        said.append(f"  {arm.label}: {figure}{_outcome(arm)}{bound}")
    if len(chosen) > ARMS_SHOWN:
        said.append(f"  and {len(chosen) - ARMS_SHOWN} more, which flatout report shows")
    return said
