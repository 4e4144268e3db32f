"""What the records of runs say about the work of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flatout.doctor import ranks as laps_of_ranks
from flatout.doctor.ranks import COMPARISON, PROGRAM, SHARD, phase_s
from flatout.errors import UserError
from flatout.scaling.maximum import LEAST_MEASUREMENTS
from flatout.wire.header import Header
from flatout.wire.lines import Lap
from flatout.wire.record import ProcessRecord, RecordError, RunRecord, read_run
from flatout.wire.request import Request, RequestError

Array = npt.NDArray[np.float64]

LEAST_STEPS = 8
"""Fewest steady steps of which a mean is taken."""


@dataclass(frozen=True)
class Exchanges:
    """What the ranks share out and send each other in a step, on average (``wire.lines.Lap``)."""

    calls: float
    rows: float
    backwards: float
    meetings: float
    gathers: float
    gathered_bytes: float
    sums: float
    summed_bytes: float


@dataclass(frozen=True)
class MeasuredRun:
    """What was measured in a run.

    Attributes:
        directory: of the run.
        header: of the record of rank 0.
        ranks: their number; 1: it was one process.
        threads: of each of them.
        inputs: the signature of the inputs (``wire/signature.py``).
        forwards: outermost module calls in a step, on average, shared out or not.
        step_s: the time of each step.
        shard_s: the time of the forward and backward passes of a rank in each step, the mean over
            the ranks.
        alike_s: what every rank does alike, likewise.
        comparison_s: what a rank does because there are others, likewise; 0 in one process.
        deviations: how much longer a rank has taken for all this than the mean of the ranks, in
            parts of it, for each rank and step; none of one process.
        exchanges: of a step; ``None``: it was one process.
    """

    directory: Path
    header: Header
    ranks: int
    threads: int | None
    inputs: tuple[str, ...] | None
    forwards: float
    step_s: Array
    shard_s: Array
    alike_s: Array
    comparison_s: Array
    deviations: Array
    exchanges: Exchanges | None


def read(directory: Path) -> MeasuredRun:
    """Read a run of one process, or of several ranks.

    Raises:
        UserError: it is no run, or its record does not tell enough.
    """
    try:
        run = read_run(directory)
    except RecordError as error:
        raise UserError(f"the record cannot be read: {error}") from None
    main = run.main
    if main is None or len(main.steady_steps) < LEAST_STEPS:
        raise UserError(
            f"{directory} has too few steps: at least {LEAST_STEPS} are needed after the first ones"
        )
    if main.shared_work is None:
        return measure_alone(main)
    _check_processors(directory, main, main.shared_work.ranks)
    return measure_ranks(run, main.shared_work.ranks)


def measure_alone(process: ProcessRecord) -> MeasuredRun:
    """Return what was measured in a run of one process."""
    steps = process.steady_steps
    shard_s = [
        sum(step.phases_ms[name] or 0.0 for name in ("forward", "backward")) / 1e3 for step in steps
    ]
    step_s = np.array([step.step_ms / 1e3 for step in steps])
    return MeasuredRun(
        process.path.parent,
        process.header,
        1,
        process.threads,
        process.inputs,
        sum(step.forwards for step in steps) / len(steps),
        step_s,
        np.array(shard_s),
        step_s - np.array(shard_s),
        np.zeros(len(steps)),
        np.zeros(0),
        None,
    )


def measure_ranks(run: RunRecord, size: int) -> MeasuredRun:
    """Return what was measured in a run of several ranks.

    Raises:
        UserError: a rank has recorded too little, or nothing was shared out.
    """
    processes = laps_of_ranks.processes_of_ranks(run)
    missing = [rank for rank in range(size) if rank not in processes]
    if missing:
        raise UserError(
            f"rank {missing[0]} of {run.directory} has recorded no steps, so how the ranks differ "
            "is not known"
        )
    main = processes[0]
    usual = laps_of_ranks.usual_laps(main, main.steady_steps)
    by_number = [
        {lap.number: lap for lap in laps_of_ranks.laps_of(processes[r])} for r in processes
    ]
    usual = [
        (step, laps)
        for step, laps in usual
        if all(lap.number in known for known in by_number for lap in laps)
    ]
    if len(usual) < LEAST_STEPS or len(usual) * size < LEAST_MEASUREMENTS:
        raise UserError(
            f"{run.directory} has too few steps of which every rank has recorded its time: "
            f"at least {max(LEAST_STEPS, -(-LEAST_MEASUREMENTS // size))} are needed"
        )
    steps = [[[known[lap.number] for lap in laps] for known in by_number] for _, laps in usual]
    exchanges = _exchanges([laps for _, laps in usual])
    if not exchanges.calls:
        raise UserError(f"nothing was shared out in {run.directory}, so more ranks gain nothing")
    shard_s, alike_s, comparison_s = (
        np.array([[sum(phase_s(lap, phase) for lap in laps) for laps in step] for step in steps])
        for phase in (SHARD, PROGRAM, COMPARISON)
    )
    own_s = shard_s + alike_s + comparison_s
    return MeasuredRun(
        run.directory,
        main.header,
        size,
        main.threads,
        main.inputs,
        sum(step.forwards for step, _ in usual) / len(usual),
        np.array([sum(map(laps_of_ranks.duration_s, laps)) for _, laps in usual]),
        shard_s.mean(axis=1),
        alike_s.mean(axis=1),
        comparison_s.mean(axis=1),
        find_deviations(own_s),
        exchanges,
    )


def find_deviations(own_s: Array) -> Array:
    """Return how much longer each rank takes than the mean of the ranks, in parts of it.

    What all ranks have in common, such as a batch that is larger, does not make them wait. The
    deviations from the mean of ``n`` ranks have a variance that is smaller by ``(n - 1) / n`` than
    that of the times; this is made up for.

    Args:
        own_s: the time of each step (first dimension) on each rank (second).
    """
    ranks = own_s.shape[1]
    differences = (own_s - own_s.mean(axis=1, keepdims=True)) / own_s.mean()
    scaled: Array = np.ravel(differences) * np.sqrt(ranks / (ranks - 1))
    return scaled


def _exchanges(steps: Sequence[Sequence[Lap]]) -> Exchanges:
    return Exchanges(
        **{
            name: sum(getattr(lap, name) for laps in steps for lap in laps) / len(steps)
            for name in Exchanges.__dataclass_fields__
        }
    )


def _check_processors(directory: Path, main: ProcessRecord, size: int) -> None:
    """Check that each rank had processors of its own.

    Raises:
        UserError: it had not.
    """
    try:
        ranks = Request.read(directory).ranks
    except (OSError, RequestError):
        return  # a record may come without its request
    processors = None if ranks is None else ranks.processors
    if processors is not None and size * (main.threads or 1) > len(processors):
        raise UserError(
            f"in {directory}, {size} ranks with {main.threads or 1} thread"
            f"{'s' * ((main.threads or 1) > 1)} each shared {len(processors)} processors, so "
            "their times are not those of ranks with processors of their own"
        )
