"""Compares the page faults of the bare program with and without flatout's agent inside it.

The layout of a program's heap decides whether the allocator keeps freed memory, or returns it to
the system at each step. When the next step uses returned memory again, each page causes a page
fault. The agent, flatout's code inside the program, keeps its own memory elsewhere
(``launch/hook/sitecustomize.py``), but in some programs a small difference in the layout is enough.
So the program runs once without the agent, and the page faults of this run are counted from
outside. If page faults take a different share of the time in this run, the step time of the bare
program is corrected for the difference.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flatout.wire.record import ProcessRecord

LEAST_FACTOR = 3.0
"""The rates of page faults (per second) of two runs count as different if one rate is at least this
many times the other. Other processes may cause a smaller difference: if they slow a run down to
half its speed, it has half as many page faults per second."""

NEGLIGIBLE = 0.03
"""The step time is corrected only if the correction changes it by more than this share."""

WINDOW_S = 1.5
"""Page faults are counted for this many seconds, or for ``WINDOW_STEPS`` steps if these take
longer."""

WINDOW_STEPS = 5
WARMUP_STEPS = 10
"""Number of steps before page faults are counted."""

BUDGET_SHARE = 1 / 10
"""Share of the budget that the run without the agent may take."""


class Sample(NamedTuple):
    """The page faults of a process at one time.

    Attributes:
        at_s: the time since the start of the run.
        minor_faults: the number of minor page faults of the process so far.
    """

    at_s: float
    minor_faults: int


@dataclass
class Observer:
    """Samples the page faults of the processes that this process has started.

    Args:
        until_s: the time from the creation of the observer to the end of the run, in seconds.
    """

    until_s: float
    _began_s: float = field(default_factory=time.monotonic)
    _samples: dict[int, list[Sample]] = field(default_factory=dict)
    _cpu_ticks: dict[int, int] = field(default_factory=dict)

    def __call__(self, _: Path) -> bool:
        """Take a sample; return whether the run is to end."""
        import psutil

        at_s = time.monotonic() - self._began_s
        for process in psutil.Process().children(recursive=True):
            try:
                status = Path(f"/proc/{process.pid}/stat").read_text()
            except OSError:  # the process has ended, or this is not Linux
                continue
            fields = status.rpartition(")")[2].split()  # proc_pid_stat(5), from field 3 on
            self._samples.setdefault(process.pid, []).append(Sample(at_s, int(fields[7])))
            self._cpu_ticks[process.pid] = int(fields[11]) + int(fields[12])
        return at_s > self.until_s

    @property
    def samples(self) -> list[Sample]:
        """The samples of the process that has used the most CPU time."""
        if not self._cpu_ticks:
            return []
        return self._samples[max(self._cpu_ticks, key=self._cpu_ticks.__getitem__)]


def faults_per_s(samples: Sequence[Sample], from_s: float) -> float | None:
    """Return the page faults per second from a time on; ``None`` if there are too few samples."""
    later = [sample for sample in samples if sample.at_s >= from_s]
    if len(later) < 2 or later[-1].at_s - later[0].at_s < WINDOW_S / 2:
        return None
    first, last = later[0], later[-1]
    return (last.minor_faults - first.minor_faults) / (last.at_s - first.at_s)


@dataclass(frozen=True)
class Unwatched:
    """What a run of the bare program without the agent has shown.

    Attributes:
        faults_per_s: the minor page faults per second of this run.
        fault_us: the time that each page fault adds to the step, in microseconds.
    """

    faults_per_s: float
    fault_us: float

    def factor(self, process: ProcessRecord) -> float:
        """Return the step time without the agent, divided by the step time of a run with the agent.

        The result is 1 if the page faults of the two runs do not differ (``LEAST_FACTOR``), or if
        the difference is negligible. It is assumed that a step spends the same time outside page
        faults in both runs. So the ratio of the step times follows from the share of the time that
        page faults take in each run.

        Args:
            process: the record of a run of the bare program under the agent.
        """
        steps = [step for step in process.steady_steps if step.minor_faults is not None]
        in_s = sum(step.step_ms for step in steps) / 1e3
        if not in_s:
            return 1.0
        watched = sum(step.minor_faults or 0.0 for step in steps) / in_s
        few, many = sorted((watched, self.faults_per_s))
        if many < LEAST_FACTOR * few:
            return 1.0
        factor = (1 - self._share(watched)) / (1 - self._share(self.faults_per_s))
        return factor if abs(factor - 1) > NEGLIGIBLE else 1.0

    def _share(self, faults_per_s: float) -> float:
        """Return the share of the time that page faults take."""
        return min(faults_per_s * self.fault_us / 1e6, 0.9)


def describe(factor: float | None) -> str | None:
    """Return what a factor of ``Unwatched.factor`` means for a claim, as a clause.

    The result is ``None`` if the factor is 1, or if there is none.
    """
    if factor is None or factor == 1.0:
        return None
    change = f"{abs(factor - 1):.0%} {'shorter' if factor < 1 else 'longer'}"
    return (
        f"without flatout's agent, a step of the bare program is about {change}, because it has "
        f"{'fewer' if factor < 1 else 'more'} page faults; the claimed speedup is computed with "
        "this step time"
    )


def encode(samples: Sequence[Sample]) -> list[Mapping[str, float]]:
    """Return samples as JSON values."""
    return [sample._asdict() for sample in samples]


def decode(values: Sequence[Mapping[str, float]]) -> list[Sample]:
    """Return the samples that ``encode`` has turned into JSON values."""
    return [Sample(float(one["at_s"]), int(one["minor_faults"])) for one in values]
