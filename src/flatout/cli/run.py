"""``flatout run``: the command, watched, to its end."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from flatout import paths
from flatout.errors import UserError
from flatout.launch import environment, process
from flatout.launch.runs import new_run_directory
from flatout.record import RecordError, read_step_times, write_failure
from flatout.request import Request

SUMMARY = "run a command, with a plan or just watched"
TAKES_JOB = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan (flatout.toml)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=SETTING",
        help="turn one knob by hand, on top of the plan; may be repeated",
    )


def execute(arguments: argparse.Namespace) -> int:
    request = Request(settings=_settings(arguments))
    run_directory = None
    if not environment.is_disabled():
        run_directory = _prepare(request)
    exited = process.run(arguments.command, environment.job_environment(run_directory, {}))
    if run_directory is not None:
        print(f"flatout: {_summary(run_directory)}", file=sys.stderr)
    return process.exit_like(exited.returncode)


def _settings(arguments: argparse.Namespace) -> dict[str, str]:
    settings: dict[str, str] = {}
    if arguments.plan is not None:
        from flatout import plan

        settings.update(plan.read(arguments.plan).settings)
    if arguments.set:
        from flatout import knobs

        for word in arguments.set:
            name, separator, setting = word.partition("=")
            if not separator:
                raise UserError(f"--set takes KNOB=SETTING, not {word!r}")
            knobs.check(name, setting)
            settings[name] = setting
    return settings


def _prepare(request: Request) -> Path | None:
    try:
        run_directory = new_run_directory()
        request.write(run_directory)
    except OSError as error:
        print(
            f"flatout: nothing is recorded, the command runs bare: {paths.runs_directory()}: "
            f"{error.strerror}",
            file=sys.stderr,
        )
        return None
    return run_directory


def _summary(run_directory: Path) -> str:
    where = paths.shown(run_directory)
    failure = write_failure(run_directory)
    if failure is not None:
        return f"the record could not be written to its end in {where}: {failure}"
    try:
        times = read_step_times(run_directory)
    except RecordError as error:
        return f"the record cannot be read: {error}"
    if times is None:
        if any(run_directory.glob("started-*")):
            return f"torch was never imported, so there was nothing to watch; record in {where}"
        return (
            "no Python of this command loaded the agent (python -I, sudo, a container, or no "
            f"Python at all?), so nothing was watched; record in {where}"
        )
    if not times.turns:
        return f"no training or inference step was seen; record in {where}"
    median_ms = statistics.median(times.turns)
    kind = "steps" if times.trains else "inference steps"
    trouble = f"; {times.failures} of flatout's own parts failed, see there" * bool(times.failures)
    return f"{len(times.turns)} {kind}, median {median_ms:.4g} ms; record in {where}{trouble}"
