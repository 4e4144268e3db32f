"""``flatout doctor``: where the time of a step goes, and what would help."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flatout.launch import Finished
    from flatout.machine import Ceilings
    from flatout.wire.record import RunRecord

SUMMARY = "find what limits a program on this machine"
TAKES_JOB = True

DEFAULT_STEPS = 60
DEFAULT_SECONDS = 45.0
PROFILE_STEPS = 20
"""At most; long steps need fewer."""

_PROGRESS_EVERY_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout doctor``."""
    parser.add_argument(
        "--steps",
        type=int,
        default=DEFAULT_STEPS,
        metavar="N",
        help=f"steps to time; some more are profiled (default: {DEFAULT_STEPS})",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=DEFAULT_SECONDS,
        metavar="S",
        help="stop timing this many seconds after the first step, at the end of a step "
        f"(default: {DEFAULT_SECONDS:g})",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KNOB=SETTING",
        help="turn a knob, to see what is left; may be repeated",
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write the diagnosis here as well"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="keep the program's output in a file instead"
    )
    parser.add_argument(
        "--in-place",
        action="store_true",
        help="let the program write to your files: it is stopped half way",
    )


def execute(arguments: argparse.Namespace) -> int:
    """Run the command for a while, diagnose it, print what was found."""
    from flatout import doctor, knobs, launch, machine, paths
    from flatout.errors import UserError
    from flatout.report import terminal
    from flatout.wire.request import Request

    if arguments.steps < 1:
        raise UserError("--steps must be at least 1")
    if not arguments.seconds > 0:
        raise UserError("--seconds must be more than 0")
    if arguments.json is not None:
        paths.check_writable(arguments.json)
    settings = knobs.parse_settings(arguments.set)
    progress = _Progress(arguments.steps)
    finished = launch.start(
        arguments.command,
        Request(
            settings=settings,
            stop_steps=arguments.steps,
            stop_seconds=arguments.seconds,
            profile_steps=PROFILE_STEPS,
        ),
        isolate=not arguments.in_place,
        output="capture" if arguments.quiet else "inherit",
        progress=progress.show if sys.stderr.isatty() else None,
    )
    progress.clear()
    run = finished.read_record()
    if run.main is None or not run.main.turns:
        raise UserError(_why_no_step(run, finished, arguments.quiet))
    diagnosis = doctor.diagnose(
        run, _ceilings(run.main.header["executable"]), machine.usable_cores()
    )
    if arguments.json is not None:
        document = diagnosis.document() | {"returncode": finished.returncode}
        try:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from None
    sys.stdout.flush()
    terminal.print_diagnosis(diagnosis, sys.stdout)
    for event in run.main.events:
        if event.subject in settings and event.what in ("skipped", "failed"):
            print(f"flatout: {event.subject} {event.what}: {event.why}", file=sys.stderr)
    if finished.returncode != 0:
        print(f"flatout: the program {_ended(finished)} in its window", file=sys.stderr)
    if arguments.quiet:
        print(f"flatout: the program's output is in {_output_file(finished)}", file=sys.stderr)
    return 0


def _ceilings(python: str) -> Ceilings | None:
    from flatout import machine
    from flatout.errors import UserError

    print("flatout: comparing with what this machine can do", file=sys.stderr)
    try:
        return machine.ceilings(python)
    except UserError as error:
        print(f"flatout: {error}", file=sys.stderr)
        return None


def _why_no_step(run: RunRecord, finished: Finished, quiet: bool) -> str:
    where = f"; its output is in {_output_file(finished)}" if quiet else ""
    if finished.returncode != 0:
        return f"the program {_ended(finished)} before its first step was over{where}"
    if run.main is not None:
        return f"no training or inference step was seen in this program{where}"
    if any(finished.run_directory.glob("started-*")):
        return f"this program never imported torch{where}"
    return (
        "no Python of this command loaded flatout's agent (python -I, sudo, a container, or no "
        f"Python at all?){where}"
    )


def _ended(finished: Finished) -> str:
    if finished.returncode < 0:
        return f"died by signal {-finished.returncode}"
    return f"exited with status {finished.returncode}"


def _output_file(finished: Finished) -> str:
    from flatout import paths
    from flatout.launch import OUTPUT_FILE

    return paths.shown(finished.run_directory / OUTPUT_FILE)


class _Progress:
    """One line on stderr that is written over.

    Args:
        steps: how many are wanted.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._shown_at_s = time.monotonic()
        self._is_shown = False

    def show(self, run_directory: Path) -> None:
        """Count the steps recorded so far."""
        from flatout.wire.record import RecordError, read_run

        now_s = time.monotonic()
        if now_s - self._shown_at_s < _PROGRESS_EVERY_S:
            return
        self._shown_at_s = now_s
        try:
            main = read_run(run_directory).main
        except RecordError:
            return  # its first line is being written
        done = min(len(main.turns), self._steps) if main is not None else 0
        bar = ("█" * (20 * done // self._steps)).ljust(20, "·")
        text = f"flatout: {bar} {done} of {self._steps} steps"
        sys.stderr.write(f"\r\x1b[K{text}\r")  # what the program writes next goes over it
        sys.stderr.flush()
        self._is_shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self._is_shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
