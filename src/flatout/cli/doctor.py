"""``flatout doctor``: where the time of a step goes, and what would help."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flatout import paths
from flatout.errors import UserError

if TYPE_CHECKING:
    from flatout.launch import Finished
    from flatout.machine import Ceilings

SUMMARY = "run some steps of a command and tell where their time goes"
TAKES_JOB = True

PROFILED_STEPS = 5
START_SECONDS = 600
"""Time that a program may take beyond --seconds, for its imports, its data and a first step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=int, default=60, metavar="N", help="steps to time (default: 60)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=45.0,
        metavar="S",
        help="stop timing after S seconds in any case (default: 45)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the diagnosis here as well"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="keep the command's output in a file, unshown"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="let the command write to your real files, though it is stopped half way",
    )


def execute(arguments: argparse.Namespace) -> int:
    from flatout import launch, machine
    from flatout.doctor import diagnose
    from flatout.record import RecordError, read_run
    from flatout.request import Request

    if arguments.steps < 1 or arguments.seconds <= 0:
        raise UserError("--steps and --seconds must be positive")
    request = Request(
        stop_steps=arguments.steps,
        stop_seconds=arguments.seconds,
        profile_steps=PROFILED_STEPS,
    )
    with _progress(arguments.steps) as progress:
        finished = launch.start(
            arguments.command,
            request,
            isolate=not arguments.in_place,
            output="capture" if arguments.quiet else "inherit",
            timeout_seconds=arguments.seconds + START_SECONDS,
            progress=progress,
        )
    try:
        run = read_run(finished.run_directory)
    except RecordError as error:
        raise UserError(str(error)) from None
    _check_steps(finished, bool(run.main and run.main.turns), run.main is not None)
    assert run.main is not None
    diagnosis = diagnose(run, _ceilings(run.main.header["executable"]), machine.usable_cores())
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(diagnosis.document(), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from None
    from rich.console import Console

    from flatout.report.terminal import print_diagnosis

    console = Console(highlight=False)
    print_diagnosis(diagnosis, console)
    for event in run.main.events:
        if event.what in ("failed", "skipped"):
            console.print(f"note: {event.subject} {event.what}: {event.why}", markup=False)
    if arguments.quiet:
        output = paths.shown(finished.run_directory / launch.OUTPUT_FILE)
        console.print(f"the command's output is in {output}", markup=False)
    return 0


def _check_steps(finished: Finished, has_steps: bool, has_record: bool) -> None:
    """Say in one sentence why there is nothing to diagnose."""
    if has_steps:
        return
    if finished.output:
        sys.stderr.write(finished.output[-2000:])
    if finished.timed_out:
        raise UserError(f"the command made no step in {finished.seconds:.0f} s and was ended", 1)
    if finished.returncode != 0:
        raise UserError(
            f"the command ended with status {finished.returncode} before its first step", 1
        )
    if has_record:
        raise UserError("the command ended without a training or inference step", 1)
    started = any(finished.run_directory.glob("started-*"))
    reason = (
        "never imported torch"
        if started
        else "started no Python that loads the agent (python -I, sudo, a container?)"
    )
    raise UserError(f"the command {reason}, so there is nothing to diagnose", 1)


def _ceilings(python: str) -> Ceilings | None:
    from flatout import machine

    try:
        return machine.ceilings(python)
    except UserError as error:
        print(f"flatout: {error}", file=sys.stderr)
        return None


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[Path], None] | None]:
    """A progress bar on standard error, when that is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from flatout.record import RecordError, read_run

    columns = (TextColumn("flatout: steps"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("steps", total=steps)

        def show(run_directory: Path) -> None:
            with contextlib.suppress(RecordError):  # nothing written yet
                process = read_run(run_directory).main
                bar.update(task, completed=min(steps, len(process.turns) if process else 0))

        yield show
