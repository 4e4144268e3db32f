"""What doctor says of a run with several ranks, from laps that are written by hand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest

from flatout.doctor import Diagnosis, diagnose, ranks
from flatout.report.terminal import print_diagnosis
from flatout.wire.record import ProcessRecord
from tests.shared_laps import HEADER, lap, process, run, step

STEPS = 13
STEP_MS = 100.0
FIRST = {"program_s": 0.02, "shard_s": 0.06, "waiting_s": 0.005, "communication_s": 0.015}
SECOND = {"program_s": 0.02, "shard_s": 0.05, "waiting_s": 0.015, "communication_s": 0.015}
ODD = {"waiting_s": 0.1}
"""A lap of a step that does not count."""


def of_rank(rank: int, seconds: dict[str, float], size: int = 2) -> ProcessRecord:
    """13 steps of 100 ms with one lap each; the first three and the last do not count."""
    times = [seconds if 3 <= n < STEPS - 1 else ODD for n in range(STEPS)]
    # The clock of a lap ends a little after that of its step, or before.
    laps = [lap(n, (n + 1) / 10 + (-1) ** n * 1e-3, **times[n]) for n in range(STEPS)]
    marks = {STEPS - 1: "profiled"} if rank == 0 else {}
    steps = [step(n, n / 10, STEP_MS, mark=marks.get(n)) for n in range(STEPS)]
    return process(rank, size, laps, steps)


def diagnosed(*processes: ProcessRecord, usable_cores: float = 2) -> Diagnosis:
    return diagnose(run(*processes), None, usable_cores)


def test_steps_that_do_not_count_do_not_count_on_any_rank() -> None:
    found = diagnosed(of_rank(0, FIRST), of_rank(1, SECOND)).document()["ranks"]
    assert [times["rank"] for times in found["times"]] == [0, 1]
    for times, seconds in zip(found["times"], (FIRST, SECOND), strict=True):
        assert times["step_ms"] == pytest.approx(STEP_MS)
        shares = {f"{name}_s": share / 10 for name, share in times["shares"].items() if share}
        assert shares == pytest.approx(seconds)
        assert times["phases_ms"]["shard"] == pytest.approx(seconds["shard_s"] * 1e3)
    json.dumps(found)


def test_the_bound_is_that_of_all_ranks() -> None:
    """One rank alone would need 0.02 s + 4 * 0.055 s, four of them 0.02 s + 0.055 s."""
    processes = [of_rank(rank, FIRST if rank % 2 else SECOND, size=4) for rank in range(4)]
    diagnosis = diagnosed(*processes, usable_cores=4)
    assert diagnosis.document()["ranks"]["bound"] == pytest.approx(0.24 / 0.075)
    text = io.StringIO()
    print_diagnosis(diagnosis, text)
    assert "4 ranks give at most 3.2x" in text.getvalue()


def test_the_report_has_a_row_for_each_rank_and_says_what_is_not_known() -> None:
    diagnosis = diagnosed(of_rank(0, FIRST), process(1, 2, [], []))
    text = io.StringIO()
    print_diagnosis(diagnosis, text)
    rows = [line.split() for line in text.getvalue().splitlines()]
    assert ["0", "100", "ms", "60.0%", "20.0%", "0.0%", "5.0%", "15.0%", "0.0%"] in rows
    assert ["1", "not", "measured"] in rows
    found = diagnosis.document()["ranks"]
    assert found["times"][1] is None
    assert found["bound"] == pytest.approx((0.02 + 2 * 0.06) / 0.08)


def test_without_laps_of_rank_0_nothing_is_known() -> None:
    alone = process(0, 2, [], of_rank(0, FIRST).steps)
    found = diagnosed(alone, of_rank(1, FIRST)).document()["ranks"]
    assert found == {"number": 2, "bound": None, "times": [None, None]}
    text = io.StringIO()
    print_diagnosis(diagnosed(alone, of_rank(1, FIRST)), text)
    assert "2 ranks; how much faster they can be is not measured" in text.getvalue()


def test_a_program_without_ranks_has_none() -> None:
    diagnosis = diagnosed(process(0, 2, [], of_rank(0, FIRST).steps))
    assert diagnosis.document()["ranks"] is None
    text = io.StringIO()
    print_diagnosis(diagnosis, text)
    assert "rank" not in text.getvalue()


def test_a_step_with_two_optimizers_has_two_laps() -> None:
    steps = [step(n, n / 10, STEP_MS) for n in range(STEPS)]
    laps = [
        lap(2 * n + part, n / 10 + end_s, **{name: seconds})
        for n in range(STEPS)
        for part, (end_s, name, seconds) in enumerate(
            [(0.04, "shard_s", 0.04), (0.1, "program_s", 0.06)]
        )
    ]
    found = ranks.measure(run(process(0, 2, laps, steps)), steps[3:])
    assert found is not None
    assert found.times[0] is not None
    assert found.times[0].step_ms == pytest.approx(STEP_MS)
    assert found.times[0].share("shard") == pytest.approx(0.4)


def test_what_lies_between_steps_belongs_to_none() -> None:
    steps = [step(0, 0.0, 100.0), step(1, 1.0, 100.0)]
    laps = [lap(0, 0.1, shard_s=0.1), lap(1, 0.6, shard_s=0.2), lap(2, 1.1, shard_s=0.1)]
    grouped = [
        (of.index, [lap.number for lap in own]) for of, own in ranks.laps_of_steps(laps, steps)
    ]
    assert grouped == [(0, [0]), (1, [2])]


def test_idle_in_communication_is_that_of_rank_0() -> None:
    finding = find("idle-in-communication", of_rank(0, FIRST), of_rank(1, SECOND))
    assert finding.share == pytest.approx(0.2)
    assert finding.evidence == [
        "rank 0: 15% of a step in communication, 5% waiting for the slowest rank",
        "rank 1: 15% of a step in communication, 15% waiting for the slowest rank",
        "what every rank does alike limits 2 ranks to 1.7x",
    ]
    quiet = {"program_s": 0.02, "shard_s": 0.077, "waiting_s": 0.003}
    assert find("idle-in-communication", of_rank(0, quiet), of_rank(1, SECOND)) is None


@pytest.mark.parametrize(
    ("threads", "cores", "remedy"),
    [
        (1, 2, None),
        (2, 2, "let each of the --ranks compute with 1 thread"),
        (4, 4, "let each of the --ranks compute with 2 threads"),
        (1, 1, "run at most 1 --ranks"),
    ],
)
def test_threads_of_all_ranks_are_compared_with_the_cores(
    threads: int, cores: float, remedy: str | None
) -> None:
    header = replace(HEADER, threads=threads)
    steps = of_rank(0, FIRST).steps
    laps = [lap(n, (n + 1) / 10, shard_s=0.1) for n in range(STEPS)]
    first = process(0, 2, laps, steps, header)
    finding = find("oversubscribed-threads", first, usable_cores=cores)
    assert (None if finding is None else finding.remedy.removeprefix("edit: ")) == remedy


def find(kind: str, *processes: ProcessRecord, usable_cores: float = 2) -> Any:
    found = diagnosed(*processes, usable_cores=usable_cores).findings
    return next((finding for finding in found if finding.kind == kind), None)
