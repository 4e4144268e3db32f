"""Makes a diagnosis of a record: where the time of a step goes, and what would help."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flatout.doctor import ranks
from flatout.doctor.case import Case, TimedSteps
from flatout.doctor.findings import Finding, find_all
from flatout.errors import UserError
from flatout.machine import Ceilings
from flatout.wire.record import RunRecord


@dataclass(frozen=True)
class Diagnosis:
    """What ``flatout doctor`` found.

    Attributes:
        case: the figures that the findings are made from.
        findings: what limits the program; the largest share comes first, and findings without a
            share come last.
    """

    case: Case
    findings: list[Finding]

    @property
    def bottleneck(self) -> str | None:
        """The kind of the first finding, ``None`` where there is none."""
        return self.findings[0].kind if self.findings else None

    def document(self) -> dict[str, Any]:
        """The diagnosis as JSON types; a figure that was not measured is ``None``."""
        case = self.case
        last = case.steps[-1]
        profiled = case.process.profile is not None
        return {
            "program": case.process.header.program,
            "torch": case.process.header.torch,
            "trains": case.process.trains,
            "steps": len(case.steps),
            "micro_batches": case.process.micro_batches,
            "warmup_steps": len(case.warmup_steps),
            "warmup_ms": sum(step.step_ms for step in case.warmup_steps),
            "step_ms": case.step_ms,
            "mean_step_ms": case.mean_step_ms,
            "phases_ms": case.phases_ms,
            "evaluations": len(case.evaluations),
            "evaluation_ms": sum(turn.step_ms for turn in case.evaluations),
            "bottleneck": self.bottleneck,
            "mfu": case.mfu,
            "flops_per_step": case.flops_per_step,
            "uncounted_operators": case.uncounted_operators if profiled else None,
            "dtype": case.main_dtype,
            "operators": (
                [asdict(o) for o in case.operators_by_name[:20]] if case.operators else None
            ),
            "operators_share": case.all_operators_share,
            "minor_faults_per_step": case.minor_faults_per_step,
            "peak_rss_bytes": last.peak_rss_bytes,
            "peak_device_bytes": case.peak_device_bytes,
            "threads": case.process.header.threads,
            "usable_cores": case.usable_cores,
            "others_share": case.other_work.taken,
            "lost_share": case.other_work.lost,
            "ranks": _ranks_document(case.ranks),
            "findings": [asdict(finding) for finding in self.findings],
            "record": str(case.process.path),
        }


def diagnose(
    run: RunRecord, ceilings: Ceilings | None, usable_cores: float | None = None
) -> Diagnosis:
    """Diagnose the main process of a run.

    Args:
        run: the record of the run.
        ceilings: what the machine of the run can do at most, ``None`` if not known.
        usable_cores: how many cores the job could use, ``None`` if not known.

    Raises:
        UserError: the record has no step.
    """
    process = run.main
    if process is None or not process.timed_steps:
        raise UserError(
            "flatout saw no training or inference step, so there is nothing to diagnose"
        )
    measured = ranks.measure(run, TimedSteps(process).steps)
    case = Case(process, ceilings, usable_cores, measured, _count_at_once(run))
    return Diagnosis(case, find_all(case))


def _count_at_once(run: RunRecord) -> int:
    """Return how many processes made steps during at least half of the main process's steps."""
    periods = [
        (process.loop_steps[0].at_s + started_s, process.loop_steps[-1].end_s + started_s)
        for process in run.processes
        if process.loop_steps
        for started_s in [process.header.started_unix_s]
    ]
    first_s, last_s = periods[0]
    overlaps_s = (min(last_s, end_s) - max(first_s, begin_s) for begin_s, end_s in periods)
    return sum(overlap_s >= (last_s - first_s) / 2 for overlap_s in overlaps_s)


def _ranks_document(measured: ranks.Ranks | None) -> dict[str, Any] | None:
    """The times of the ranks as JSON types; what was not measured is ``None``."""
    if measured is None:
        return None
    return {
        "number": measured.size,
        "bound": measured.bound,
        "times": [
            None
            if times is None
            else {
                "rank": times.rank,
                "step_ms": times.step_ms,
                "phases_ms": times.phases_ms,
                "shares": {phase: times.share(phase) for phase in ranks.RANK_PHASES},
            }
            for times in measured.times
        ],
    }
