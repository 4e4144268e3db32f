"""``flatout run --tune``: what to compare in the real training, and the plan that comes of it."""

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
"""Classes of the settings that are compared without a proof: their arithmetic is the program's."""

BLOCK_STEPS, DISCARD_STEPS, WARMUP_STEPS, ROUNDS = 6, 2, 5, 8

DEVICES = ("cpu", "cuda", "xpu", "mps")
"""What the job computes on shows when it runs: a setting that has nothing to do there refuses."""


def request(arguments: argparse.Namespace) -> Request:
    """What the agent shall do.

    Raises:
        UserError: the plan's file cannot be written, or holds a plan that is proven.
    """
    path = _path(arguments)
    paths.check_writable(path)
    if path.exists() and plan.read(path).learned is None:
        raise UserError(
            f"{path} holds a plan that was not learned by --tune: run with it (without --tune), or "
            "name another file by --plan"
        )
    if arguments.set:
        raise UserError("--tune turns knobs itself: leave --set out")
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
    """Write down what was learned; returns it in words.

    Args:
        arguments: of ``flatout run``.
        run_directory: of the run that has ended.
    """
    try:
        times = read_step_times(run_directory)
    except RecordError:
        return []  # it has been told already
    if times is None:
        return []
    if times.learned is None:
        return ["nothing was learned: the program ended before the comparison did"]
    said = []
    kept: dict[str, str] = {}
    ratios: dict[str, float] = {}
    for one in times.learned:
        ratio = Ratio(one.value, one.low, one.high, one.pairs)
        said.append(
            f"{one.knob}={one.setting}: {ratio} in-process, {'kept' if one.kept else 'not kept'}"
        )
        if one.kept:
            kept[one.knob] = one.setting
            ratios[one.knob] = one.value
    if not kept:
        return [*said, "no setting that changes no arithmetic was faster, beyond noise"]
    path = _path(arguments)
    facts: Mapping[str, plan.Fact] = {
        **machine.fingerprint(),
        "torch": times.header.torch,
        "threads": times.header.threads or 0,
    }
    Plan(
        settings=kept,
        command=tuple(arguments.command),
        program=program.observed(arguments.command, times.modules),
        inputs=times.inputs,
        machine=facts,
        learned=ratios,
    ).write(path)
    command = shlex.join(arguments.command)
    return [
        *said,
        f"an unproven plan of {', '.join(f'{k}={s}' for k, s in kept.items())} is in {path}; to "
        f"prove and extend it: flatout tune --plan {shlex.quote(str(path))} -- {command}",
    ]


def _path(arguments: argparse.Namespace) -> Path:
    path: Path | None = arguments.plan
    return Path(PLAN_FILE) if path is None else path
