"""Starts a job under the agent: run directory, environment, isolation, process."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flatout import knobs, paths
from flatout.errors import UserError
from flatout.launch import companions, environment, process, trackers
from flatout.launch import relay as relay_stage
from flatout.launch.runs import new_directory, new_run_directory
from flatout.wire.record import RecordError, RunRecord, read_run
from flatout.wire.request import Relay, Request
from flatout.wire.writer import reason_record_incomplete

OUTPUT_FILE = "output.txt"
"""The file in the run directory that holds the captured output of the job."""

RELAY_FOLDER = "relay"
"""The folder in the first of two run directories by which their agents alternate."""


@dataclass(frozen=True)
class Finished:
    """A job that has ended.

    Attributes:
        run_directory: where its record is.
        returncode: its exit status; if negative, the signal that killed it.
        seconds: how long it ran.
        output: what it wrote to standard output and error; ``None``: that was not captured.
        timed_out: whether it was killed because its time was over.
        rank_failure: a sentence about the rank that failed; ``None``: none did.
    """

    run_directory: Path
    returncode: int
    seconds: float
    output: str | None
    timed_out: bool
    rank_failure: str | None = None

    def read_record(self) -> RunRecord:
        """Read what was recorded.

        Raises:
            UserError: the record could not be written to its end, or cannot be read.
        """
        failure = reason_record_incomplete(self.run_directory)
        if failure is not None:
            raise UserError(
                f"the record cannot be written to {paths.shown(self.run_directory)}: {failure}; "
                "FLATOUT_HOME can name another place"
            )
        try:
            return read_run(self.run_directory)
        except RecordError as error:
            raise UserError(f"the record cannot be read: {error}") from None


def start(
    command: Sequence[str],
    request: Request,
    *,
    isolate: bool = False,
    output: Literal["inherit", "discard", "capture"] = "inherit",
    timeout_seconds: float | None = None,
    progress: Callable[[Path], bool | None] | None = None,
    runs: Path | None = None,
    watched: bool = True,
) -> Finished:
    """Run a trial of a job to its end, with its trackers offline. No process of it is left then.

    Args:
        command: program and arguments.
        request: what the agent shall do.
        isolate: run it in a copy-on-write view of the file system, which is discarded afterwards.
        output: what becomes of the job's standard output and error.
        timeout_seconds: kill the job after this time.
        progress: called twice a second with the run directory while the job runs. The job is ended
            once it returns true.
        runs: where its run directory is made; by default, where the records of runs are kept.
        watched: whether it runs under the agent; if not, nothing is recorded.

    Raises:
        UserError: the program does not exist, the record cannot be written, or isolation is not
            available.
    """
    process.check_program(command[0])
    request = companions.add_ranks(request)
    try:
        run_directory = new_run_directory() if runs is None else new_directory(runs)
        request.write(run_directory)
    except OSError as error:
        raise UserError(
            f"the record cannot be written to {runs or paths.runs_directory()}: {error.strerror}; "
            "FLATOUT_HOME can name another place"
        ) from None
    job = _isolated(command, [run_directory]) if isolate else list(command)
    variables = knobs.prepare(request, os.environ)
    prepared = trackers.offline(
        environment.job_environment(run_directory if watched else None, variables)
    )
    descriptor = _open_output(output, run_directory)
    options: dict[str, Any] = {
        "output": descriptor,
        "timeout_seconds": timeout_seconds,
        "contained": True,
        "run_directories": [str(run_directory)],
        "tick": None if progress is None else partial(progress, run_directory),
    }
    failure = None
    try:
        if request.ranks is None:
            ended = process.run(job, prepared, **options)
        else:
            ended, failure = companions.run(
                command,
                prepared,
                run_directory,
                request.ranks,
                rank_0_command=job,
                scratch=_scratch(),
                **options,
            )
    finally:
        if descriptor is not None:
            os.close(descriptor)
    captured = _read_output(run_directory) if output == "capture" else None
    return Finished(
        run_directory, ended.returncode, ended.seconds, captured, ended.timed_out, failure
    )


def start_relay(
    command: Sequence[str],
    requests: tuple[Request, Request],
    relay: Relay,
    *,
    isolate: bool = False,
    timeout_seconds: float | None = None,
    progress: Callable[[Path], None] | None = None,
    runs: Path | None = None,
) -> tuple[Finished, Finished]:
    """Run two trials of a job that alternate (``agent/relay.py``). No process of them is left then.

    Args:
        command: program and arguments.
        requests: what the agents shall do; ``relay`` is filled in here.
        relay: how they alternate; ``folder`` and ``place`` are filled in here.
        isolate: run each in its own copy-on-write view, which is discarded afterwards.
        timeout_seconds: kill both after this time.
        progress: called twice a second with the first run directory while they run.
        runs: see ``start``.

    Returns how each ended. If one failed, the other was killed by a signal.

    Raises:
        UserError: as ``start``.
    """
    process.check_program(command[0])
    directories = _relay_directories(requests, relay, runs)
    folder = directories[0] / RELAY_FOLDER
    jobs = [
        _relay_job(command, request, directory, folder, isolate)
        for request, directory in zip(requests, directories, strict=True)
    ]
    descriptor = _open_output("capture", folder)
    try:
        ended = process.run(
            relay_stage.command(jobs, folder),
            os.environ,
            output=descriptor,
            timeout_seconds=timeout_seconds,
            contained=True,
            run_directories=[str(directory) for directory in directories],
            tick=None if progress is None else partial(progress, directories[0]),
        )
    finally:
        if descriptor is not None:
            os.close(descriptor)
    try:
        statuses = json.loads((folder / relay_stage.STATUSES_FILE).read_text())
    except FileNotFoundError:  # the stage was killed before both had ended
        statuses = [ended.returncode or -signal.SIGTERM] * 2
    of_stage = _read_output(folder)
    one, other = (
        Finished(
            directory,
            status,
            ended.seconds,
            _read_output(directory) + of_stage,
            ended.timed_out,
        )
        for directory, status in zip(directories, statuses, strict=True)
    )
    return one, other


def _relay_directories(
    requests: tuple[Request, Request], relay: Relay, runs: Path | None
) -> list[Path]:
    """Make the run directories of two trials that alternate, and write their requests there.

    Raises:
        UserError: one of them cannot be written to.
    """
    try:
        directories = [
            new_run_directory() if runs is None else new_directory(runs) for _ in requests
        ]
        folder = directories[0] / RELAY_FOLDER
        folder.mkdir()
        for place, (request, directory) in enumerate(zip(requests, directories, strict=True)):
            own = dataclasses.replace(relay, folder=str(folder), place=place)
            dataclasses.replace(request, relay=own).write(directory)
    except OSError as error:
        raise UserError(
            f"the record cannot be written to {paths.runs_directory()}: {error.strerror}; "
            "FLATOUT_HOME can name another place"
        ) from None
    return directories


def _relay_job(
    command: Sequence[str], request: Request, directory: Path, folder: Path, isolate: bool
) -> dict[str, Any]:
    """One of the jobs of ``relay.command``."""
    prepared = environment.job_environment(directory, knobs.prepare(request, os.environ))
    variables = trackers.offline(prepared)
    return {
        "command": _isolated(command, [directory, folder]) if isolate else list(command),
        "variables": {k: v for k, v in variables.items() if os.environ.get(k) != v},
        "output": str(directory / OUTPUT_FILE),
    }


def _isolated(job: Sequence[str], passthrough: Sequence[Path]) -> list[str]:
    from flatout.launch import isolation

    reason = isolation.unavailable_reason()
    if reason is not None:
        raise UserError(
            f"{reason} Without isolation the job would be stopped midway on your real files; "
            "--in-place allows that."
        )
    return isolation.command(job, passthrough=passthrough, scratch=_scratch())


def _scratch() -> Path:
    """The folder in which caches persist between trials."""
    return paths.cache_directory() / "scratch"


def _open_output(output: str, run_directory: Path) -> int | None:
    if output == "inherit":
        return None
    path = os.devnull if output == "discard" else str(run_directory / OUTPUT_FILE)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _read_output(directory: Path) -> str:
    """The output captured there; empty if the stage ended before it began to write."""
    try:
        return (directory / OUTPUT_FILE).read_text("utf-8", "replace")
    except FileNotFoundError:
        return ""
