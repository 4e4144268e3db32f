"""Makes the document of a tune from its outcome."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from flatout import knobs, machine
from flatout.knob import EXACTNESS
from flatout.tune import memory, pairs
from flatout.tune.document import (
    CheckResult,
    CurvePoint,
    Curves,
    Document,
    KnobResult,
    ProofResult,
    QuietnessResult,
    Side,
    TriedSettings,
)
from flatout.tune.journal import format_resume_command
from flatout.tune.ledger import LedgerEntry, Outcome
from flatout.tune.pairs import Cost
from flatout.tune.proof import Curve, Verdict
from flatout.tune.quiet import Quietness
from flatout.tune.trial import Trial


def make_document(
    command: Sequence[str], plan: Path, outcome: Outcome, options: Sequence[str] = ()
) -> Document:
    """Make the document of an outcome.

    Args:
        command: the command line of the job.
        plan: the path at which the plan is written, if there is a plan.
        outcome: the outcome of the tune.
        options: the options of the tune, as words of the command line. The command that resumes the
            tune repeats them.
    """
    found, header = outcome.pairs, outcome.header
    not_measurable = None if found is None else found.quietness.why_not_measurable
    has_plan = outcome.evidence is not None and found is not None
    baseline, with_plan, break_even = Side(), None, None
    if found is not None:
        bare, plan_cost = found.costs
        baseline = _side(found.baseline_runs[: found.count], bare, outcome)
        if has_plan:
            with_plan = _side(found.variant_runs[: found.count], plan_cost, outcome)
            break_even = pairs.break_even_steps(bare, plan_cost, outcome.seconds)
    elif outcome.pace is not None:
        baseline = Side(
            step_ms=outcome.pace.step_s * 1e3,
            startup_s=outcome.startup_s,
            phases_ms=outcome.phases_ms,
        )
    next_command = None
    if has_plan:
        next_command = shlex.join(["flatout", "run", "--plan", str(plan), "--", *command])
    elif outcome.interrupted:
        next_command = format_resume_command("tune", options, command)
    return Document(
        command=tuple(command),
        program=header.program,
        torch=header.torch or None,
        machine=machine.fingerprint(),
        seconds=outcome.seconds,
        finished_unix_s=round(time.time(), 3),
        plan=str(plan) if has_plan else None,
        settings=dict(outcome.settings),
        why=outcome.why,
        baseline=baseline,
        with_plan=with_plan,
        claim=found.ratio if has_plan and found is not None and not not_measurable else None,
        unlike_s=outcome.unlike_s,
        unwatched_factor=found.unwatched_factor if has_plan and found is not None else None,
        quietness=None if found is None or not found.count else _quietness(found.quietness),
        break_even_steps=break_even,
        tried=list_tried(outcome.entries, outcome.refused),
        knobs=tuple(
            KnobResult(
                knob=name,
                setting=setting,
                summary=knobs.get(name).summary,
                exactness=EXACTNESS[knobs.get(name).exactness[setting]],
                by_hand=knobs.get(name).card.by_hand,
                in_process=outcome.find_ratio_in_process(name, setting),
                gain_on_top=outcome.find_gain_on_top(name, setting),
                predicted=outcome.find_prediction(name, setting),
            )
            for name, setting in outcome.settings.items()
        ),
        proof=None if outcome.verdict is None else _proof(outcome.verdict),
        findings=tuple(outcome.findings),
        next_command=next_command,
    )


def list_tried(
    tried: Sequence[LedgerEntry], refused: Mapping[str, str]
) -> tuple[TriedSettings, ...]:
    """List, for the document, the settings that were tried and those that were not.

    Args:
        tried: the settings that were compared or left out.
        refused: for each knob that was not tried, the reason.
    """
    return (
        *(
            TriedSettings(
                settings=dict(entry.settings),
                label=", ".join(f"{name}={setting}" for name, setting in entry.settings.items()),
                stage=entry.stage,
                ratio=entry.ratio,
                state=entry.state,
                why=entry.why,
                bound=entry.bound,
                predicted=entry.predicted,
            )
            for entry in tried
        ),
        *(
            TriedSettings(
                settings={},
                label=name,
                stage="inside one process",
                ratio=None,
                state="not tried",
                why=why,
            )
            for name, why in refused.items()
        ),
    )


def _quietness(found: Quietness) -> QuietnessResult:
    return QuietnessResult(
        others_share=found.taken,
        quiet_share=found.blocks_share,
        pairs=found.pairs,
        counted=found.counted,
        floors=found.floors,
        why_not_measurable=found.why_not_measurable,
    )


def _side(runs: Sequence[Trial], cost: Cost, outcome: Outcome) -> Side:
    job_steps = outcome.job_steps
    steps = [done.process.loop_steps for done in runs]
    return Side(
        step_ms=cost.step_ms,
        median_step_ms=pairs.median_step_ms([done.process for done in runs]),
        startup_s=cost.startup_s,
        warmup_s=cost.warmup_s,
        peak_rss_bytes=memory.peak_rss_bytes(steps),
        peak_device_bytes=memory.peak_device_bytes(steps),
        job_s=None if job_steps is None else cost.job_s(job_steps) + outcome.unlike_s,
        phases_ms=pairs.phases_ms([done.process for done in runs], cost.step_ms),
    )


def _proof(verdict: Verdict) -> ProofResult:
    return ProofResult(
        passed=None if verdict.passed and verdict.kind == "inconclusive" else verdict.passed,
        kind="bitwise" if verdict.kind == "bitwise" else "non-inferior",
        why=verdict.why,
        steps=verdict.steps,
        seeds=verdict.seeds,
        bare_repeats=verdict.bare_repeats,
        checks=tuple(
            CheckResult(
                name=check.name,
                passed={"passed": True, "failed": False}.get(check.result),
                why=check.why,
                measurements=dict(check.measurements),
            )
            for check in verdict.checks
        ),
        curves=tuple(
            Curves(
                f"loss {number}",
                _points(c.steps, c.bare, c.bare_spread),
                _points(c.steps, c.plan, c.plan_spread),
            )
            for number, c in enumerate(verdict.curves, 1)
        ),
        losses=verdict.losses,
    )


def _points(steps: Sequence[int], means: Curve, spreads: Curve) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(step, mean, mean - spread, mean + spread)
        for step, mean, spread in zip(steps, means, spreads, strict=True)
    )
