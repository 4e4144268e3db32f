"""Records of ranks, written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from flatout.wire.header import Header
from flatout.wire.lines import Lap, SharedWork
from flatout.wire.record import ProcessRecord, RunRecord, Step
from flatout.wire.request import RANK_VARIABLE
from flatout.wire.turns import PHASES
from flatout.wire.writer import record_path

HEADER = Header(program="train.py", torch="2.13.0", threads=1)


def lap(number: int, end_s: float, **fields: Any) -> Lap:
    """A lap of which only the fields that are given are not 0."""
    values = dict.fromkeys(Lap._fields, 0) | {"number": number, "end_s": end_s}
    return Lap(**(values | fields))


def step(number: int, at_s: float, step_ms: float, **fields: Any) -> Step:
    """A training step."""
    values: dict[str, Any] = {
        "index": number,
        "at_s": at_s,
        "step_ms": step_ms,
        "phases_ms": dict.fromkeys(PHASES),
        "losses": (),
        "forwards": 1,
        "backwards": 1,
        "updates": 1,
        "minor_faults": 0,
        "major_faults": 0,
        "peak_rss_bytes": 2**28,
        "peak_device_bytes": None,
        "arm": None,
        "mark": None,
        "grad": True,
    }
    return Step(**(values | fields))


def process(
    rank: int, ranks: int, laps: list[Lap], steps: list[Step], header: Header = HEADER
) -> ProcessRecord:
    """What a rank has recorded.

    Args:
        rank, ranks: of the process.
        laps: of it; none: it has recorded no work.
        steps: of its training.
        header: without its rank.
    """
    own = replace(header, environment={RANK_VARIABLE: str(rank)})
    work = SharedWork(ranks, {"Net": len(laps)}, (), {}, tuple(laps)) if laps else None
    return ProcessRecord(record_path(Path("run"), rank + 1), own, steps, shared_work=work)


def run(*processes: ProcessRecord) -> RunRecord:
    """A run of these processes."""
    return RunRecord(Path("run"), list(processes))
