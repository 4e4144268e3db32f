"""Runs a command as several ranks that are one program: rank 0 and its *companions*.

Each rank runs the whole command, on cores of its own. Rank 0 is the program: it is started as a
job without ranks is, so its terminal, output, files, signals and exit status are the program's. A
companion is in a session of its own; its output goes to the run directory, what it writes goes into
a copy-on-write view that is discarded, and its trackers are offline (``companion_stage.py``).

The run directory tells the ranks of each other's end: ``died-RANK`` is there once a companion has
failed. If a companion is killed, rank 0 gets time to end by itself, and is then ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flatout import paths
from flatout.errors import UserError
from flatout.knobs import ranks as ranks_knob
from flatout.launch import companion_stage, isolation, process, trackers
from flatout.machine import cores
from flatout.wire.request import (
    RANK_VARIABLE,
    RANKS_VARIABLE,
    RUN_VARIABLE,
    SEED_VARIABLE,
    Ranks,
    Request,
)

MOST_RANKS_PER_PROCESSOR = 4
"""More ranks than processors gain nothing, but let programs be tried; beyond this number they only
exhaust the memory."""

OWN_END_S = 7.0
"""Time that rank 0 gets to end by itself once a companion was killed. Together with the time
between SIGTERM and SIGKILL (``process``) it is less than ten seconds."""

FOLLOWING_S = 5.0
"""Time that companions get to end after rank 0 has ended by itself: to write their records."""

_THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_SEED_BITS = 32
"""``PYTHONHASHSEED`` and NumPy's global generator take no larger seeds."""

_NOT_SENT_BY_USERS = {
    signal.SIGKILL,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
}
"""Signals that tell of a failure, or of a kernel that was out of memory."""


def add_ranks(request: Request, *, goes_alone: bool = False) -> Request:
    """Add the ranks that the settings of a request ask for, if they do.

    Args:
        request: of a run or a trial.
        goes_alone: whether rank 0 goes on alone where that is right or faster, see ``Ranks``.

    Raises:
        UserError: the program cannot be run as several ranks here.
    """
    setting = request.settings.get(ranks_knob.NAME)
    if setting is None or request.ranks is not None:
        return request
    refusal = ranks_knob.find_refusal(setting)
    if refusal is not None:
        raise UserError(refusal)
    if ranks_knob.LAUNCHER_VARIABLE in os.environ:
        raise UserError(f"it is one of several processes: {ranks_knob.LAUNCHER_VARIABLE} is set")
    ranks = make_ranks(ranks_knob.number(setting))
    ranks = replace(ranks, goes_alone=goes_alone, gives_up=goes_alone)
    return replace(request, ranks=ranks)


def make_ranks(size: int) -> Ranks:
    """Return what the agents of a run with several ranks must know, with fresh seeds.

    Args:
        size: their number.

    Raises:
        UserError: there are too few cores, or what companions write could not be kept from the
            user's files.
    """
    allowed = cores.allowed_processors()
    processors = len(allowed)
    most = MOST_RANKS_PER_PROCESSOR * processors
    if size > most:
        raise UserError(
            f"--ranks {size} is too many for {processors} processor{'s' * (processors > 1)}: at "
            f"most {most} ranks, {MOST_RANKS_PER_PROCESSOR} for each that flatout may use"
        )
    reason = isolation.unavailable_reason()
    if reason is not None:
        raise UserError(
            f"--ranks needs a copy-on-write view of the files, or all ranks would write to your "
            f"real ones: {reason}"
        )
    threads = (os.environ.get(name, "") for name in _THREADS_VARIABLES)
    return Ranks(
        size,
        secrets.randbits(_SEED_BITS),
        secrets.randbits(_SEED_BITS),
        tuple(allowed),
        next((int(number) for number in threads if number.isdecimal()), None),
    )


def run(
    command: Sequence[str],
    environment: Mapping[str, str],
    run_directory: Path,
    ranks: Ranks,
    *,
    rank_0_command: Sequence[str] | None = None,
    scratch: Path | None = None,
    tick: Callable[[], object] | None = None,
    **options: Any,
) -> tuple[process.Exit, str | None]:
    """Run a command as several ranks to the end of rank 0. No process of its companions is left.

    Args:
        command: program and arguments.
        environment: of a job without ranks.
        run_directory: its run directory.
        ranks: their number and seeds.
        rank_0_command: how rank 0 is started, if not by ``command``: with a view of its own.
        scratch: where the views of companions keep caches, see ``isolation.command``.
        tick: called every ``process.TICK_S`` while rank 0 runs.
        options: further arguments of ``process.run`` for rank 0.

    Returns how rank 0 ended, and a sentence about the rank that failed, ``None`` if none did or
    rank 0 goes on alone then.

    Raises:
        UserError: the program does not exist or cannot be executed.
    """
    process.check_program(command[0])
    shares = cores.share_out(cores.nodes(cores.allowed_processors()), ranks.size)
    variables = _common_variables(environment, run_directory, ranks)
    companions = _Companions(command, variables, run_directory, shares, scratch)

    def must_end() -> bool:
        if tick is not None:
            tick()
        return not ranks.goes_alone and companions.must_rank_0_end()

    try:
        exited = process.run(
            rank_0_command or command,
            {**variables, RANK_VARIABLE: "0"},
            tick=must_end,
            processors=shares[0],
            spared=companions.stage_pid,
            **options,
        )
        sentence = companions.explain(exited.returncode)
        if exited.returncode >= 0 and not companions.ended_rank_0:
            companions.wait_for_end()
    finally:
        companions.end()
    if companions.ended_rank_0:
        exited = process.Exit(1, exited.seconds)
    if ranks.goes_alone and exited.returncode >= 0:
        sentence = None  # rank 0 has said why it stops, or went on alone
    return exited, sentence


def output_file(run_directory: Path, rank: int) -> Path:
    """The file that holds the output of a companion."""
    return run_directory / f"rank-{rank}.txt"


@dataclass(frozen=True)
class _Failure:
    """How a companion has failed, in words, and its exit status or negative signal."""

    rank: int
    how: str
    returncode: int


class _Companions:
    """The stage of a run that runs its companions.

    Args:
        command: program and arguments.
        variables: environment of all ranks.
        run_directory: of the run.
        shares: the processors of each rank, those of rank 0 among them.
        scratch: see ``run``.

    Attributes:
        ended_rank_0: whether rank 0 was ended because a companion was killed.
        stage_pid: id of the process that runs them.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        run_directory: Path,
        shares: Sequence[Sequence[int]],
        scratch: Path | None,
    ) -> None:
        self.ended_rank_0 = False
        self._run_directory = run_directory
        self._killed_s: float | None = None
        companions = [
            {
                "rank": rank,
                "variables": {RANK_VARIABLE: str(rank)},
                "output": str(output_file(run_directory, rank)),
                "processors": list(processors),
            }
            for rank, processors in enumerate(shares)
            if rank
        ]
        job = isolation.command(command, passthrough=[run_directory], scratch=scratch)
        with open(run_directory / "companions.txt", "ab") as output:
            self._stage = subprocess.Popen(
                companion_stage.command(job, companions, run_directory, os.getpid()),
                env=trackers.offline(variables),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.stage_pid = self._stage.pid

    def must_rank_0_end(self) -> bool:
        """Whether a companion was killed and rank 0 has not ended in time."""
        if self._killed_s is None:
            if self._stage.poll() or any(one.returncode < 0 for one in self._failed()):
                self._killed_s = time.monotonic()
        elif time.monotonic() - self._killed_s >= OWN_END_S:
            self.ended_rank_0 = True
        return self.ended_rank_0

    def explain(self, returncode: int) -> str | None:
        """A sentence about the rank that failed first; ``None``: none did, or all alike.

        Args:
            returncode: how rank 0 ended.
        """
        if -returncode in _NOT_SENT_BY_USERS and not self.ended_rank_0:
            how = companion_stage.ending(returncode)
            return f"rank 0 has died: {how}, so the other ranks were ended"
        first = next(iter(self._failed()), None)
        if first is not None:
            output = paths.shown(output_file(self._run_directory, first.rank))
            what = f"rank {first.rank} has died: {first.how} (output: {output})"
        elif self._stage.poll():
            how = companion_stage.ending(self._stage.returncode)
            what = f"the process that runs the other ranks has died: {how}"
        else:
            return None
        if self.ended_rank_0:
            return f"{what}, so rank 0 was ended"
        is_own_failure = returncode >= 0 and (first is None or first.returncode != returncode)
        return what if is_own_failure else None

    def wait_for_end(self) -> None:
        """Let the companions end by themselves, for some seconds or until Ctrl-C."""
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            self._stage.wait(FOLLOWING_S)

    def end(self) -> None:
        """End the companions and all that they have started."""
        self._stage.terminate()
        if self._stage.wait():
            self._kill_left()

    def _failed(self) -> list[_Failure]:
        """The companions that have failed, the first one first."""
        prefix = companion_stage.STATUS_PREFIX
        notes = [
            path
            for path in self._run_directory.glob(f"{prefix}*")
            if path.name.removeprefix(prefix).isdecimal()
        ]
        found = []
        for note in sorted(notes, key=lambda path: path.stat().st_mtime_ns):
            how, returncode = note.read_text("utf-8").splitlines()
            found.append(_Failure(int(note.name.removeprefix(prefix)), how, int(returncode)))
        return found

    def _kill_left(self) -> None:
        """Kill what companions have started, after the stage was killed."""
        run = f"{RUN_VARIABLE}={self._run_directory}".encode()
        rank_0 = f"{RANK_VARIABLE}=0".encode()
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    entries = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                    if run in entries and rank_0 not in entries:
                        os.kill(int(name), signal.SIGKILL)


def _common_variables(
    environment: Mapping[str, str], run_directory: Path, ranks: Ranks
) -> dict[str, str]:
    """The environment of all ranks. Numbers of threads that the user has set are divided."""
    variables = dict(environment)
    for name in _THREADS_VARIABLES:
        if variables.get(name, "").isdecimal():
            variables[name] = str(max(1, int(variables[name]) // ranks.size))
    if not variables.get("PYTHONHASHSEED"):
        variables["PYTHONHASHSEED"] = str(ranks.hash_seed)
    return {
        **variables,
        RUN_VARIABLE: str(run_directory),
        RANKS_VARIABLE: str(ranks.size),
        SEED_VARIABLE: str(ranks.seed),
    }
