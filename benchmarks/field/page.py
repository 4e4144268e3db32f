"""The table of the field, and its page in the documentation."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from benchmarks.field.program import ROOT, Program, read_programs
from benchmarks.outside import Results
from flatout.tune.statistics import estimate_ratio
from flatout.wire.ratios import Ratio

MEASURED = ROOT / "benchmarks" / "field" / "measured.jsonl"
PAGE = ROOT / "docs" / "field.md"

NOT_MEASURED = "not measured"

NEVER_SLOWER = 0.97
"""What the upper bound of a ratio must reach: below it, the program is slower beyond noise."""

CONFIDENCE = 0.95

HEAD = """\
# The field

Programs as their users write and start them, on packages that others maintain. `make field`
installs the packages with torch 2.14.1 from PyPI, runs `flatout doctor` and `flatout tune` on each
program, and then the program with its plan and without, in pairs. To add a program, add one file to
`benchmarks/field/programs/`.

- *step*: the median time of a step of the bare program, by doctor. Where gradients accumulate, it
  is that of a micro-batch.
- *finding*: what limits the program most, by doctor.
- *tune*: how long `flatout tune` took.
- *claim*: how many times faster the plan makes the program, by tune; in brackets the 95 %
  confidence interval.
- *outside*: the same by a clock outside of both, for the whole job from start to end.
- *own clock*: the same by the time that the program itself prints, if it prints one.
- *same result?*: what the program prints as its result. *equal*: the same digits with the plan as
  without. *within the seeds*: it differs by no more than another seed would make the bare program
  differ (a 95 % prediction interval from three seeds).

"""


@dataclass(frozen=True)
class Verdict:
    """What came out for one program.

    Attributes:
        program: the program.
        step_ms: the time of a step; ``None``: not measured.
        micro_batches: the number of steps to an optimizer step.
        finding: what limits the program most; empty: nothing does, or it is not known.
        tune_s: the time of the tune.
        settings: of the plan; ``None``: there was no tune.
        why: the reason why there is no plan, or empty.
        claim: of the plan.
        outside, own_clock: the time of the job without the plan over that with it.
        same: the answer to "same result?".
        faults: what must not be, in words.
    """

    program: Program
    step_ms: float | None
    micro_batches: int
    finding: str
    tune_s: float | None
    settings: Mapping[str, str] | None
    why: str
    claim: Ratio | None
    outside: Ratio | None
    own_clock: Ratio | None
    same: str
    faults: Sequence[str]


def judge(program: Program, results: Results) -> Verdict:
    """Return what came out for a program so far."""
    doctor = _last(results.of(program.name, "doctor"))
    tuned = _last(results.of(program.name, "tune"))
    pairs = results.of(program.name, "pair")
    findings = doctor.get("findings") or []
    outside = _ratio([(pair["bare"]["seconds"], pair["plan"]["seconds"]) for pair in pairs])
    same, differs = _compare_results(program, results)
    faults = _find_failures(program, results)
    if differs:
        faults.append(f"result: {same}")
    if outside is not None and outside.high < NEVER_SLOWER:
        faults.append(f"slower under its plan: {outside}")
    return Verdict(
        program=program,
        step_ms=doctor.get("step_ms"),
        micro_batches=doctor.get("micro_batches") or 1,
        finding=findings[0]["title"] if findings else "",
        tune_s=tuned.get("seconds"),
        settings=tuned.get("settings"),
        why=tuned.get("why") or "" if tuned.get("plan") is None else "",
        claim=Ratio(**tuned["claim"]) if tuned.get("claim") else None,
        outside=outside,
        own_clock=_ratio([(p["bare"]["clock_s"], p["plan"]["clock_s"]) for p in pairs]),
        same=same,
        faults=faults,
    )


def _last(lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return lines[-1] if lines else {}


def _ratio(pairs: Sequence[tuple[float | None, float | None]]) -> Ratio | None:
    """Return how many times the first of each pair is the second; ``None``: not measured."""
    measured = [(bare, plan) for bare, plan in pairs if bare and plan]
    if len(measured) < 2:
        return None
    return estimate_ratio([math.log(bare / plan) for bare, plan in measured])


def _find_failures(program: Program, results: Results) -> list[str]:
    """Return the failures of the last measurement of each kind, in words."""
    found = []
    for kind in ("unprepared", "doctor", "bare", "watched", "tune"):
        line = _last(results.of(program.name, kind))
        if line.get("failure"):
            found.append(f"{kind}: {line['failure']}")
    for pair in results.of(program.name, "pair"):
        found += [
            f"{side}: {pair[side]['failure']}" for side in ("bare", "plan") if pair[side]["failure"]
        ]
    return found


def _compare_results(program: Program, results: Results) -> tuple[str, bool]:
    """Return whether the program trains the same with its plan as without, in words, and whether it
    shows otherwise.

    Without a plan, the runs that flatout only watched are compared.
    """
    by_seed = [run["result"] for run in results.of(program.name, "bare") if run["result"]]
    pairs = results.of(program.name, "pair")
    bare = [run for pair in pairs if (run := pair["bare"]["result"])] or by_seed[:1]
    watched = [run for line in results.of(program.name, "watched") if (run := line["result"])]
    plan = [run for pair in pairs if (run := pair["plan"]["result"])]
    for runs, name in ((watched, "watched"), (plan, "with the plan")):
        if not runs or not bare:
            continue
        if all(run == bare[0] for run in (*bare, *runs)):
            same = "equal"
            continue
        limits = _limits(by_seed)
        means = [statistics.fmean(values) for values in zip(*runs, strict=True)]
        outside = [
            f"{mean:.4g} {name}, {low:.4g} to {high:.4g} by bare's seeds"
            for mean, (low, high) in zip(means, limits, strict=True)
            if not low <= mean <= high
        ]
        if outside:
            return "**no**: " + "; ".join(outside), True
        if name == "watched" and program.deterministic and all(run == bare[0] for run in bare):
            return "**no**: it differs when flatout only watches", True
        same = "within the seeds"
    return (same, False) if (plan or watched) and bare else (NOT_MEASURED, False)


def _limits(by_seed: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return for each number of the result the interval in which that of one more seed would lie:
    Student's prediction interval (Geisser 1993, "Predictive Inference")."""
    limits = []
    for values in zip(*by_seed, strict=True):
        count, mean = len(values), statistics.fmean(values)
        if count < 2:
            limits.append((-math.inf, math.inf))
            continue
        quantile = float(stats.t.ppf(0.5 + CONFIDENCE / 2, count - 1))
        reach = quantile * statistics.stdev(values) * math.sqrt(1 + 1 / count)
        limits.append((mean - reach, mean + reach))
    return limits


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the table in Markdown, and below it what must not be."""
    lines = [
        "| program | step | finding | tune | plan | claim | outside | own clock | same result? |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(_cells(verdict))} |" for verdict in verdicts),
        "",
    ]
    for verdict in verdicts:
        lines += [f"- {verdict.program.title}: {_first_line(fault)}" for fault in verdict.faults]
    return "\n".join(lines) + "\n"


def in_one_line(verdict: Verdict) -> str:
    """Return what came out for a program, for a terminal."""
    cells = _cells(verdict)
    return ", ".join([*cells[1:], *(_first_line(fault) for fault in verdict.faults)])


def _cells(verdict: Verdict) -> list[str]:
    settings = NOT_MEASURED if verdict.settings is None else f"none: {verdict.why or 'failed'}"
    if verdict.settings:
        settings = ", ".join(f"`{name}={setting}`" for name, setting in verdict.settings.items())
    nothing = "-" if verdict.settings is not None and not verdict.settings else NOT_MEASURED
    return [
        verdict.program.title,
        NOT_MEASURED if verdict.step_ms is None else _step(verdict),
        verdict.finding or (NOT_MEASURED if verdict.step_ms is None else "nothing"),
        NOT_MEASURED if verdict.tune_s is None else f"{verdict.tune_s:.0f} s",
        settings,
        *(
            nothing
            if ratio is None
            else f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"
            for ratio in (verdict.claim, verdict.outside)
        ),
        "-" if verdict.program.clock is None else _own_clock(verdict, nothing),
        verdict.same,
    ]


def _step(verdict: Verdict) -> str:
    each = f", {verdict.micro_batches} to an update" if verdict.micro_batches > 1 else ""
    return f"{verdict.step_ms:.3g} ms{each}"


def _own_clock(verdict: Verdict, nothing: str) -> str:
    ratio = verdict.own_clock
    return nothing if ratio is None else f"{ratio.value:.2f}x ({ratio.low:.2f} to {ratio.high:.2f})"


def _first_line(text: str) -> str:
    return text.splitlines()[0] + (" ..." if "\n" in text else "")


def markdown(results: Results) -> str:
    """Return the page."""
    verdicts = [judge(program, results) for program in read_programs().values()]
    pairs = [line for line in results.lines if line["kind"] == "pair"]
    note = "" if pairs else "Not measured yet.\n\n"
    return HEAD + note + table(verdicts)


def publish(results: Results) -> None:
    """Write results and page into the repository."""
    lines = (json.dumps(_without_paths(line)) for line in results.lines)
    MEASURED.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    PAGE.write_text(markdown(Results(MEASURED)), "utf-8")


def _without_paths(value: Any) -> Any:
    """Leave out what is only of use on the machine of the measurements."""
    if isinstance(value, Mapping):
        return {key: _without_paths(v) for key, v in value.items() if key not in ("said", "output")}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str):
        value = re.sub(
            r"(\.\./)+(?=\.venv-field/)", "", value
        )  # where a plan was, seen from the job
        return value.replace(f"{ROOT}/", "")
    return value
