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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flatout.errors import UserError
from flatout.knobs import ranks as ranks_knob
from flatout.launch import companion_stage, isolation, process, trackers
from flatout.launch.deaths import Deaths, output_file
from flatout.machine import accelerators, cores
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

FOLLOWING_S = 5.0
"""Time that companions get to end after rank 0 has ended by itself: to write their records."""

_THREADS_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

_SEED_BITS = 32
"""``PYTHONHASHSEED`` and NumPy's global generator take no larger seeds."""


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
    refusal = ranks_knob.find_refusal(setting) or ranks_knob.find_launcher()
    if refusal is not None:
        raise UserError(refusal)
    ranks = make_ranks(ranks_knob.number(setting))
    ranks = replace(ranks, goes_alone=goes_alone, gives_up=goes_alone)
    return replace(request, ranks=ranks)


def make_ranks(size: int) -> Ranks:
    """Return what the agents of a run with several ranks on this host must know.

    Args:
        size: their number.

    Raises:
        UserError: there are too few cores, or what companions write could not be kept from the
            user's files.
    """
    processors = len(cores.allowed_processors())
    most = MOST_RANKS_PER_PROCESSOR * processors
    if size > most:
        raise UserError(
            f"--ranks {size} is too many for {processors} processor{'s' * (processors > 1)}: at "
            f"most {most} ranks, {MOST_RANKS_PER_PROCESSOR} for each that flatout may use"
        )
    check_view()
    return seed_ranks(size)


def seed_ranks(size: int) -> Ranks:
    """Return what all ranks must know, with fresh seeds."""
    threads = (os.environ.get(name, "") for name in _THREADS_VARIABLES)
    return Ranks(
        size,
        secrets.randbits(_SEED_BITS),
        secrets.randbits(_SEED_BITS),
        tuple(cores.allowed_processors()),
        next((int(number) for number in threads if number.isdecimal()), None),
    )


def check_view() -> None:
    """Check that what a companion writes can be kept from the user's files.

    Raises:
        UserError: it cannot.
    """
    reason = isolation.unavailable_reason()
    if reason is not None:
        raise UserError(
            f"--ranks needs a copy-on-write view of the files, or all ranks would write to your "
            f"real ones: {reason}"
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
    variables = common_variables(divide_threads(environment, ranks.size), run_directory, ranks)
    found = accelerators.visible(variables)
    of_companions = {
        rank: Share(share, accelerators.share_out(found, rank))
        for rank, share in enumerate(shares)
        if rank
    }
    companions = Companions(command, variables, run_directory, of_companions, scratch)
    deaths = Deaths(run_directory, companions.status)

    def must_end() -> bool:
        if tick is not None:
            tick()
        return not ranks.goes_alone and deaths.must_rank_0_end()

    try:
        exited = process.run(
            rank_0_command or command,
            {**variables, **accelerators.share_out(found, 0), RANK_VARIABLE: "0"},
            tick=must_end,
            processors=shares[0],
            spared=companions.stage_pid,
            **options,
        )
        sentence = deaths.explain(exited.returncode)
        if exited.returncode >= 0 and not deaths.ended_rank_0:
            companions.wait_for_end()
    finally:
        companions.end()
    if deaths.ended_rank_0:
        exited = replace(exited, returncode=1)
    if ranks.goes_alone and exited.returncode >= 0:
        sentence = None  # rank 0 has said why it stops, or went on alone
    return exited, sentence


@dataclass(frozen=True)
class Share:
    """What a rank has of its host.

    Attributes:
        processors: on which it runs.
        variables: the environment variables by which it sees one accelerator.
    """

    processors: list[int]
    variables: dict[str, str]


class Companions:
    """The stage of a run that runs its companions.

    Args:
        command: program and arguments.
        variables: environment of all ranks.
        run_directory: of the run.
        shares: of each companion, by rank.
        scratch: where their views keep caches, see ``isolation.command``.

    Attributes:
        stage_pid: id of the process that runs them.
    """

    def __init__(
        self,
        command: Sequence[str],
        variables: Mapping[str, str],
        run_directory: Path,
        shares: Mapping[int, Share],
        scratch: Path | None = None,
    ) -> None:
        self._run_directory = run_directory
        companions = [
            {
                "rank": rank,
                "variables": {**share.variables, RANK_VARIABLE: str(rank)},
                "output": str(output_file(run_directory, rank)),
                "processors": share.processors,
            }
            for rank, share in shares.items()
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

    def status(self) -> int | None:
        """How the stage has ended: its exit status or negative signal; ``None``: it runs."""
        return self._stage.poll()

    def wait_for_end(self, seconds: float = FOLLOWING_S) -> None:
        """Let the companions end by themselves, for some seconds or until Ctrl-C."""
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            self._stage.wait(seconds)

    def end(self) -> None:
        """End the companions and all that they have started."""
        self._stage.terminate()
        if self._stage.wait():
            self._kill_left()

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


def divide_threads(environment: Mapping[str, str], parts: int) -> dict[str, str]:
    """Return an environment in which the numbers of threads that the user has set are divided."""
    variables = dict(environment)
    for name in _THREADS_VARIABLES:
        if variables.get(name, "").isdecimal():
            variables[name] = str(max(1, int(variables[name]) // parts))
    return variables


def common_variables(
    environment: Mapping[str, str], run_directory: Path, ranks: Ranks
) -> dict[str, str]:
    """Return the environment that all ranks have in common."""
    variables = dict(environment)
    if not variables.get("PYTHONHASHSEED"):
        variables["PYTHONHASHSEED"] = str(ranks.hash_seed)
    return {
        **variables,
        RUN_VARIABLE: str(run_directory),
        RANKS_VARIABLE: str(ranks.size),
        SEED_VARIABLE: str(ranks.seed),
    }
