"""Programs run by one process and by several ranks, to compare what they compute."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flatout.wire.request import RANK_VARIABLE, RANKS_VARIABLE, RUN_VARIABLE, Request
from tests import forking

ROOT = Path(__file__).parents[1]

BEGIN = f"""\
import sys
sys.path.append({str(ROOT)!r})
import torch
from flatout.agent import activate

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
activate()

"""
"""The first lines of a program, which have it recorded and, with ranks, shared out."""


@dataclass(frozen=True)
class Outcome:
    """How a program has ended in one of its processes.

    Attributes:
        status: its exit status.
        stdout, stderr: what it has printed.
    """

    status: int
    stdout: str
    stderr: str


def run(
    program: str,
    ranks: int,
    folder: Path,
    *,
    timeout_s: float = 120,
    request: Request = Request(seed=0),  # noqa: B008 - it is frozen
) -> list[Outcome]:
    """Run a program and return how it has ended on each rank.

    Args:
        program: Python that follows ``BEGIN``.
        ranks: their number; 1: an ordinary process.
        folder: for the program, as its working directory ``rank-R``, and for what it leaves.
        timeout_s: when the processes are killed.
        request: what the agents shall do.
    """
    script = folder / "program.py"
    script.write_text(BEGIN + program)
    run_directory = folder / f"run-{ranks}"
    run_directory.mkdir()
    request.write(run_directory)

    def run_rank(rank: int) -> Outcome:
        here = folder / f"{ranks}-rank-{rank}"
        here.mkdir()
        variables = {RUN_VARIABLE: str(run_directory)}
        if ranks > 1:
            variables |= {RANK_VARIABLE: str(rank), RANKS_VARIABLE: str(ranks)}
        done = forking.run(
            [sys.executable, script],
            cwd=here,
            env={**os.environ, **variables, "PYTHONPATH": str(ROOT)},
            timeout_s=timeout_s,
            server=rank,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run_rank, range(ranks)))
