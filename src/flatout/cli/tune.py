"""``flatout tune``: find the settings that are faster, prove them, write the plan."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flatout.plan import Evidence
    from flatout.tune.tuner import Outcome

SUMMARY = "try settings, measure and prove them, and write the plan"
TAKES_JOB = True

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout tune``."""
    from flatout.plan import PLAN_FILE

    parser.add_argument(
        "--budget",
        type=_seconds,
        default=300.0,
        metavar="TIME",
        help="how long it may take, roughly: 90s, 5m, 1h (default: 5m)",
    )
    parser.add_argument(
        "--plan",
        type=Path,
        default=Path(PLAN_FILE),
        metavar="FILE",
        help=f"where the plan is written (default: {PLAN_FILE})",
    )
    parser.add_argument(
        "--steps",
        type=_positive,
        metavar="N",
        help="steps for which the plan is proven (default: as the budget allows)",
    )
    parser.add_argument(
        "--knobs",
        type=_knobs,
        metavar="KNOB,...",
        help="try these only (default: all that match; 'flatout knobs' lists them)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of the first pair (default: 0)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write what was found to this file"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="let the trials write to your files: each starts and stops the program half way",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Tune; the exit code is 0 with and without a plan."""
    from flatout import paths
    from flatout.errors import UserError
    from flatout.tune.tuner import MINIMUM_STEPS, Options, Tuner

    if arguments.steps is not None and arguments.steps < MINIMUM_STEPS:
        raise UserError(f"--steps must be at least {MINIMUM_STEPS}")
    for path in (arguments.plan, arguments.json):
        if path is not None:
            paths.check_writable(path)
    options = Options(
        budget_seconds=arguments.budget,
        steps=arguments.steps,
        seed=arguments.seed,
        isolate=not arguments.in_place,
        knobs=arguments.knobs,
    )
    outcome = Tuner(
        arguments.command, options, _nothing if arguments.quiet else _say, _matmul_flops_per_s
    ).run()
    for line in _report(arguments, outcome):  # first: a disk may be full by now
        _say(line)
    if outcome.evidence is not None:
        _write_plan(arguments, outcome)
    if arguments.json is not None:
        document = json.dumps(_document(arguments, outcome), indent=1)
        try:
            arguments.json.write_text(document + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from error
    return 0


def _write_plan(arguments: argparse.Namespace, outcome: Outcome) -> None:
    from flatout import machine, plan

    header = outcome.header
    facts: dict[str, plan.Fact] = {
        **machine.fingerprint(),
        "torch": header["torch"],
        "threads": header["threads"],
    }
    plan.Plan(
        settings=outcome.settings,
        command=tuple(arguments.command),
        program_sha256=plan.program_sha256(arguments.command),
        inputs=outcome.inputs,
        machine=facts,
        evidence=outcome.evidence,
    ).write(arguments.plan)


def _report(arguments: argparse.Namespace, outcome: Outcome) -> list[str]:
    """The result, in words."""
    from flatout import knobs

    if outcome.evidence is None:
        return [f"no plan written: {outcome.why}"]
    evidence = outcome.evidence
    lines = [f"the plan, in {arguments.plan}:"]
    for name, setting in outcome.settings.items():
        lines.append(f"  {name} = {setting}: {knobs.get(name).summary}")
    lines.append(
        f"faster: {evidence.ratio:.2f}x ({evidence.ratio_low:.2f} to {evidence.ratio_high:.2f} "
        f"with 95 % confidence), {evidence.bare_step_ms:.4g} ms a step down to "
        f"{evidence.plan_step_ms:.4g} ms, {evidence.pairs} pairs of fresh processes"
    )
    lines += _loss_lines(evidence)
    if not evidence.bare_repeats:
        lines.append("note: the bare program does not repeat its own losses from one seed")
    plan_option = f"--plan {shlex.quote(str(arguments.plan))}"
    lines.append(f"next: flatout run {plan_option} -- {shlex.join(arguments.command)}")
    return lines


def _loss_lines(evidence: Evidence) -> list[str]:
    lines = []
    for number, loss in enumerate(evidence.losses, 1):
        which = f" {number}" if len(evidence.losses) > 1 else ""
        spread = {"seeds": "between seeds", "batches": "between batches"}[loss.yardstick]
        lines.append(
            f"loss{which} over the last quarter of {evidence.steps} steps: {loss.bare_final:.6g} "
            f"bare, {loss.plan_final:.6g} with the plan"
            + (
                ", identical at every step"
                if evidence.verdict == "bitwise"
                else f" (difference {loss.difference:+.2g}; bare's own spread {spread} "
                f"allows {loss.margin:.2g})"
            )
        )
    return lines


def _document(arguments: argparse.Namespace, outcome: Outcome) -> dict[str, Any]:
    evidence = outcome.evidence
    return {
        "command": arguments.command,
        "plan": str(arguments.plan) if evidence is not None else None,
        "settings": outcome.settings,
        "why": outcome.why,
        "evidence": None if evidence is None else dataclasses.asdict(evidence),
        "in_process": {
            name: dataclasses.asdict(ratio) for name, ratio in outcome.in_process.items()
        },
        "dropped": outcome.dropped,
        "seconds": outcome.seconds,
    }


def _matmul_flops_per_s(python: str, device: str) -> Mapping[str, float | None]:
    from flatout import machine

    rates: Mapping[str, float | None] = (
        machine.ceilings(python).devices.get(device, {}).get("matmul_flops_per_s", {})
    )
    return rates


def _say(line: str) -> None:
    print(f"flatout: {line}", file=sys.stderr, flush=True)


def _nothing(line: str) -> None:
    """``--quiet``."""


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 5m or 1h")
    return float(match[1]) * _UNITS[match[2]]


def _knobs(text: str) -> tuple[str, ...]:
    from flatout import knobs

    names = tuple(text.split(","))
    for name in names:
        if name not in knobs.registry():
            known = ", ".join(knobs.registry())
            raise argparse.ArgumentTypeError(f"there is no knob {name!r} (known: {known})")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)
