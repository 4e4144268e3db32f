"""What each rank of a run with ``--ranks`` has spent the time of a step on."""

from __future__ import annotations

import bisect
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flatout.wire.lines import Lap
from flatout.wire.record import ProcessRecord, RunRecord, Step
from flatout.wire.request import RANK_VARIABLE

SHARD, PROGRAM = "shard", "program"
WAITING, COMMUNICATION, COMPARISON = "waiting", "communication", "comparison"
RANK_PHASES = (SHARD, PROGRAM, WAITING, COMMUNICATION, COMPARISON)
"""What a rank spends time on; ``Lap`` has the time of each in the field of this name with ``_s``,
and ``parallel.balance.Phase`` says what they are. Steps in which it is tested what may be shared
out become ever rarer, and do not count."""


@dataclass(frozen=True)
class RankTimes:
    """The time of one rank.

    Attributes:
        rank: its number.
        phases_ms: the mean time of each of ``RANK_PHASES`` in a step; they sum to the step.
    """

    rank: int
    phases_ms: dict[str, float]

    @property
    def step_ms(self) -> float:
        """The mean time of a step."""
        return sum(self.phases_ms.values())

    def share(self, *phases: str) -> float:
        """The share of a step that these phases take."""
        return sum(self.phases_ms[phase] for phase in phases) / self.step_ms


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run.

    Attributes:
        size: their number.
        times: of each rank, by its number; ``None``: not measured.
    """

    size: int
    times: tuple[RankTimes | None, ...]

    @property
    def bound(self) -> float | None:
        """How many times as fast the ranks can be as one of them alone, since what every rank does
        alike does not get faster (Amdahl 1967); ``None``: not measured.

        One rank would need ``alike + size * shard``, and the ranks together at least
        ``alike + shard``.
        """
        known = [times.phases_ms for times in self.times if times is not None]
        alike_ms = sum(phases_ms[PROGRAM] for phases_ms in known)
        shard_ms = sum(phases_ms[SHARD] for phases_ms in known)
        if not alike_ms + shard_ms:
            return None
        return (alike_ms + self.size * shard_ms) / (alike_ms + shard_ms)


def laps_of_steps(laps: Sequence[Lap], steps: Sequence[Step]) -> list[tuple[Step, list[Lap]]]:
    """Return the steps of which laps were recorded, each with its laps.

    Args:
        laps: of a rank, in order.
        steps: of the same rank, in order. Steps between them may be missing.
    """
    starts_s = [step.at_s for step in steps]
    found: dict[int, list[Lap]] = {}
    for lap in laps:
        middle_s = lap.end_s - duration_s(lap) / 2  # a step ends a little before or after its lap
        number = bisect.bisect(starts_s, middle_s) - 1
        if number >= 0 and middle_s < starts_s[number] + steps[number].step_ms / 1e3:
            found.setdefault(number, []).append(lap)
    return [(steps[number], of_step) for number, of_step in found.items()]


def usual_laps(process: ProcessRecord, steps: Sequence[Step]) -> list[tuple[Step, list[Lap]]]:
    """Return the same as ``laps_of_steps``, without steps in which something was tested."""
    return [
        (step, laps)
        for step, laps in laps_of_steps(laps_of(process), steps)
        if not any(lap.testing_s for lap in laps)
    ]


def duration_s(lap: Lap) -> float:
    """The duration of a lap, in seconds."""
    return lap.testing_s + sum(phase_s(lap, phase) for phase in RANK_PHASES)


def phase_s(lap: Lap, phase: str) -> float:
    """The time of one of ``RANK_PHASES`` in a lap, in seconds."""
    seconds: float = getattr(lap, f"{phase}_s")
    return seconds


def processes_of_ranks(run: RunRecord) -> dict[int, ProcessRecord]:
    """The process of each rank that has met the others, by the number of the rank."""
    found: dict[int, ProcessRecord] = {}
    for process in run.processes:
        rank = process.header.environment.get(RANK_VARIABLE, "0")
        work = process.shared_work
        if work is not None and work.laps and rank.isdecimal():
            known = found.setdefault(int(rank), process).shared_work
            if known is not None and len(known.laps) < len(work.laps):
                found[int(rank)] = process
    return found


def measure(run: RunRecord, steps: Sequence[Step]) -> Ranks | None:
    """Return the times of the ranks.

    Args:
        run: the record of the run.
        steps: of its main process, those that count.

    Returns:
        The times; ``None``: the run has no ranks, or they are not known.
    """
    processes = processes_of_ranks(run)
    sizes = [p.shared_work.ranks for p in processes.values() if p.shared_work is not None]
    if not sizes:
        return None
    size = max(sizes)
    counted = usual_laps(processes[0], steps) if 0 in processes else []
    wanted = {lap.number for _, laps in counted for lap in laps}
    return Ranks(
        size,
        tuple(
            _mean(rank, laps_of(processes[rank]), wanted, len(counted))
            if rank in processes
            else None
            for rank in range(size)
        ),
    )


def laps_of(process: ProcessRecord) -> tuple[Lap, ...]:
    """The laps of a process, none if it is no rank."""
    return () if process.shared_work is None else process.shared_work.laps


def _mean(rank: int, laps: Iterable[Lap], wanted: set[int], steps: int) -> RankTimes | None:
    """Return the times of a rank; ``None``: it has recorded none of the laps that count."""
    own = [lap for lap in laps if lap.number in wanted]
    if not own:
        return None
    laps_per_step = len(wanted) / steps
    return RankTimes(
        rank,
        {
            phase: statistics.fmean(phase_s(lap, phase) for lap in own) * laps_per_step * 1e3
            for phase in RANK_PHASES
        },
    )
