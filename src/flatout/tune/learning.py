"""Chooses settings while a program runs to its end (``flatout run --tune``), and writes them as a
plan."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path

from flatout import machine, paths, plan
from flatout.errors import UserError
from flatout.knob import Exactness, Facts
from flatout.plan import PLAN_FILE, Plan, program
from flatout.tune import candidates
from flatout.wire.ratios import Ratio
from flatout.wire.record import RecordError, read_step_times
from flatout.wire.request import Comparison, Request

EXACTNESS: tuple[Exactness, ...] = ("bitwise", "reordered")
"""Settings of these exactness classes may be compared without a proof, because they keep the
results bit by bit, or change only the order of sums."""

BLOCK_STEPS = 6
"""Number of steps of a block. The settings alternate in blocks."""

DISCARD_STEPS = 2
"""Number of steps at the start of each block that are not timed."""

WARMUP_STEPS = 5
"""Number of steps before the first block."""

ROUNDS = 8
"""Maximum number of blocks of each setting."""

DEVICES = ("cpu", "cuda", "xpu", "mps")
"""The request names candidates for all of these devices, because the job's device is known only
once the job runs. The agent drops those that do not apply to it before it times them."""


def make_request(arguments: argparse.Namespace) -> Request:
    """Make the request for the agent, flatout's code inside the job.

    The agent compares each hot candidate (a setting that can be applied and undone between two
    steps) alone with the baseline, and keeps the settings that are faster.

    Args:
        arguments: the arguments of ``flatout run``.

    Raises:
        UserError: the plan's file cannot be written, or holds a plan that ``flatout run --tune``
            did not write; or the user has set knobs by hand (``--set``).
    """
    path = _path(arguments)
    paths.check_writable(path)
    if path.exists() and plan.read(path).learned is None:
        raise UserError(
            f"{path} holds a plan that was not learned by --tune: leave --tune out to run with "
            "this plan, or name a different file with --plan"
        )
    if arguments.set:
        raise UserError("--tune chooses the settings itself: leave --set out")
    arms: dict[str, str] = {}
    for device in DEVICES:
        known = Facts(device, huge_pages=machine.huge_pages())
        for candidate in candidates.find(known, None, EXACTNESS)[0]:
            if candidate.is_hot:
                arms.setdefault(candidate.knob, candidate.setting)
    return Request(
        comparison=Comparison(
            arms=({}, *({knob: setting} for knob, setting in arms.items())),
            block_steps=BLOCK_STEPS,
            discard_steps=DISCARD_STEPS,
            warmup_steps=WARMUP_STEPS,
            rounds=ROUNDS,
            decide="arms",
        ),
        learn=True,
    )


def conclude(arguments: argparse.Namespace, run_directory: Path) -> list[str]:
    """Write a plan of the settings that were kept; return the lines to print.

    Args:
        arguments: the arguments of ``flatout run``.
        run_directory: the directory of the run that has ended.
    """
    try:
        times = read_step_times(run_directory)
    except RecordError:
        return []  # flatout run has already said that the record cannot be read
    if times is None:
        return []
    if times.learned is None:
        return ["nothing was learned: the program ended before the comparison did"]
    lines = []
    kept: dict[str, str] = {}
    ratios: dict[str, float] = {}
    for one in times.learned:
        ratio = Ratio(one.value, one.low, one.high, one.pairs)
        kept_or_not = "kept" if one.kept else "not kept"
        lines.append(f"{one.knob}={one.setting}: {ratio} inside one process, {kept_or_not}")
        if one.kept:
            kept[one.knob] = one.setting
            ratios[one.knob] = one.value
    if not kept:
        return [*lines, "no setting that keeps the program's arithmetic was measurably faster"]
    path = _path(arguments)
    facts: Mapping[str, plan.Fact] = {
        **machine.fingerprint(),
        "torch": times.header.torch,
        "threads": times.header.threads or 0,
    }
    Plan(
        settings=kept,
        command=tuple(arguments.command),
        program=program.observe_program(arguments.command, times.imported_files),
        inputs=times.inputs,
        machine=facts,
        learned=ratios,
    ).write(path)
    command = shlex.join(arguments.command)
    return [
        *lines,
        f"an unproven plan of {', '.join(f'{k}={s}' for k, s in kept.items())} is in {path}",
        f"to prove it: flatout verify --plan {shlex.quote(str(path))} -- {command}",
        "to replace it with a proven plan of all settings that help: "
        f"flatout tune --plan {shlex.quote(str(path))} -- {command}",
    ]


def _path(arguments: argparse.Namespace) -> Path:
    path: Path | None = arguments.plan
    return Path(PLAN_FILE) if path is None else path
