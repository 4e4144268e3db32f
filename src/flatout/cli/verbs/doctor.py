"""``flatout doctor``: finds where the time of a step goes, and what would help."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatout.cli import options
from flatout.cli.streams import say

if TYPE_CHECKING:
    from flatout.doctor import Diagnosis
    from flatout.launch import Finished
    from flatout.machine import Ceilings
    from flatout.report.live import LiveLine
    from flatout.wire.record import RunRecord

SUMMARY = "find what limits a program on this machine"
EXAMPLES = (
    "flatout doctor python train.py",
    "flatout doctor --quiet --budget 2m --json diagnosis.json python train.py",
    "flatout doctor --set precision=bf16 python train.py",
    "flatout doctor --ranks 2 -- python train.py",
    "flatout doctor ~/.local/state/flatout/runs/RUN",
)
TAKES_JOB = True
ARGUMENT = ""

DEFAULT_STEPS = 60
DEFAULT_BUDGET_S = 45.0
PROFILE_STEPS = 20
"""Most steps that are profiled; fewer if they are long."""

_BAR_WIDTH = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``flatout doctor``."""
    options.add_steps(
        parser,
        DEFAULT_STEPS,
        "time this many steps, or steps until --budget is over, whichever comes first; some more "
        f"are profiled (default: {DEFAULT_STEPS})",
    )
    options.add_budget(
        parser,
        DEFAULT_BUDGET_S,
        "time steps for this long, from the first one on, or until --steps are made, whichever "
        "comes first",
    )
    parser.add_argument(  # its name in flatout 0.1
        "--seconds", type=options.duration_s, dest="budget", help=argparse.SUPPRESS
    )
    options.add_set(parser, "diagnose the program with this setting applied")
    options.add_ranks(
        parser,
        "run the program as N processes that share out the batches, and show what each of them "
        "spends its time on: its shards, what all do alike, waiting, communication",
        "1",
    )
    options.add_json(parser)
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="write the program's output to output.txt in the folder of the run's record instead",
    )
    options.add_verbose(parser, "the evidence for every finding, and more operators")
    options.add_in_place(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Run the command for a while, diagnose it, and print the diagnosis."""
    from flatout import doctor, knobs, launch, machine, paths
    from flatout.errors import UserError
    from flatout.launch import companions
    from flatout.report.live import LiveLine
    from flatout.wire.request import Request

    if arguments.json is not None:
        paths.check_writable(arguments.json)
    recorded = _find_record(arguments.command)
    if recorded is not None:
        return _diagnose_record(recorded, arguments)
    settings = knobs.parse_settings(arguments.set)
    ranks = None
    if (arguments.ranks or 1) > 1:
        knobs.check_claims(["ranks", *settings])
        ranks = companions.make_ranks(arguments.ranks)
    line = LiveLine(sys.stderr)
    finished = launch.start(
        arguments.command,
        Request(
            settings=settings,
            stop_steps=arguments.steps,
            stop_seconds=arguments.budget,
            profile_steps=PROFILE_STEPS,
            ranks=ranks,
        ),
        isolate=not arguments.in_place,
        output="capture" if arguments.quiet else "inherit",
        progress=_progress(line, arguments.steps) if line.is_live else None,
    )
    line.clear()
    run = finished.read_record()
    if run.main is None or not run.main.loop_steps:
        raise UserError(_why_no_step(run, finished, arguments.quiet))
    diagnosis = doctor.diagnose(run, _ceilings(run.main.header.executable), machine.usable_cores())
    _print(diagnosis, arguments, {"returncode": finished.returncode})
    if diagnosis.findings:
        say(f"next: flatout tune -- {shlex.join(arguments.command)}")
    if ranks is not None:
        record = paths.shown(finished.run_directory)
        say(f"how it scales to more ranks: flatout scale --network 100GbE {record}")
    for event in run.main.events:
        if event.subject in settings and event.what in ("skipped", "failed"):
            say(f"{event.subject} {event.what}: {event.why}")
    if finished.returncode != 0:
        say(f"the program {_describe_end(finished)} while it was diagnosed")
    if finished.rank_failure is not None:
        say(finished.rank_failure)
    if arguments.quiet:
        say(f"the program's output is in {_output_file(finished)}")
    return 0


def _find_record(command: Sequence[str]) -> Path | None:
    """The folder of the record of a run, if that is given in place of a command."""
    folder = Path(command[0]).expanduser()
    is_record = len(command) == 1 and folder.is_dir() and any(folder.glob("record-*.jsonl"))
    return folder if is_record else None


def _diagnose_record(folder: Path, arguments: argparse.Namespace) -> int:
    """Diagnose what a run on this machine has recorded, without running anything."""
    from flatout import doctor, machine
    from flatout.errors import UserError
    from flatout.wire.record import RecordError, read_run

    try:
        run = read_run(folder)
    except RecordError as error:
        raise UserError(f"{folder} cannot be read: {error}") from error
    if run.main is None or not run.main.loop_steps:
        raise UserError(f"the record in {folder} has no training or inference step")
    ceilings = _ceilings(run.main.header.executable)
    _print(doctor.diagnose(run, ceilings, machine.usable_cores()), arguments, {})
    return 0


def _print(diagnosis: Diagnosis, arguments: argparse.Namespace, extra: dict[str, Any]) -> None:
    from flatout.errors import UserError
    from flatout.report import terminal

    if arguments.json is not None:
        document = diagnosis.document() | extra
        try:
            arguments.json.write_text(json.dumps(document, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{arguments.json} cannot be written: {error.strerror}") from None
    sys.stdout.flush()
    terminal.print_diagnosis(diagnosis, sys.stdout, arguments.verbose)


def _ceilings(python: str) -> Ceilings | None:
    from flatout import machine
    from flatout.errors import UserError

    say("comparing with the rates of this machine, which are measured once")
    try:
        return machine.ceilings(python)
    except UserError as error:
        say(str(error))
        return None


def _why_no_step(run: RunRecord, finished: Finished, quiet: bool) -> str:
    from flatout.launch.environment import NOT_ATTACHED

    where = f"; its output is in {_output_file(finished)}" if quiet else ""
    if finished.returncode != 0:
        return f"the program {_describe_end(finished)} before its first step was over{where}"
    if run.main is not None:
        return f"flatout saw no training or inference step in this program{where}"
    if any(finished.run_directory.glob("started-*")):
        return f"this program never imported torch{where}"
    return f"{NOT_ATTACHED}{where}"


def _describe_end(finished: Finished) -> str:
    if finished.returncode < 0:
        return f"was killed by signal {-finished.returncode}"
    return f"exited with status {finished.returncode}"


def _output_file(finished: Finished) -> str:
    from flatout import paths
    from flatout.launch import OUTPUT_FILE

    return paths.shown(finished.run_directory / OUTPUT_FILE)


def _progress(line: LiveLine, steps: int) -> Callable[[Path], None]:
    """Make what shows how many steps a run has made, whenever it gets the run directory.

    Args:
        line: the line that shows it.
        steps: how many steps the run shall make.
    """
    from flatout.wire.record import RecordError, StepCounter

    counter: StepCounter | None = None

    def show(run_directory: Path) -> None:
        nonlocal counter
        counter = counter or StepCounter(run_directory)
        with contextlib.suppress(RecordError):  # it is reported when the run has ended
            done = min(counter.count(), steps)
            bar = ("█" * (_BAR_WIDTH * done // steps)).ljust(_BAR_WIDTH, "·")
            line.show(f"flatout: {bar} {done} of {steps} steps")

    return show
