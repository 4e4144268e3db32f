"""What doctor says of a run with several ranks, from laps that are written by hand."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flatout.doctor import Diagnosis, diagnose, ranks
from flatout.launch import isolation, process
from flatout.report.terminal import print_diagnosis
from flatout.wire.record import ProcessRecord
from tests import shared_laps
from tests.shared_laps import HEADER, lap, run, step

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
    return shared_laps.process(rank, size, laps, steps)


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
    diagnosis = diagnosed(of_rank(0, FIRST), shared_laps.process(1, 2, [], []))
    text = io.StringIO()
    print_diagnosis(diagnosis, text)
    rows = [line.split() for line in text.getvalue().splitlines()]
    assert ["0", "100", "ms", "60.0%", "20.0%", "5.0%", "15.0%", "0.0%"] in rows
    assert ["1", "not", "measured"] in rows
    found = diagnosis.document()["ranks"]
    assert found["times"][1] is None
    assert found["bound"] == pytest.approx((0.02 + 2 * 0.06) / 0.08)


def test_without_laps_of_rank_0_nothing_is_known() -> None:
    alone = shared_laps.process(0, 2, [], of_rank(0, FIRST).steps)
    found = diagnosed(alone, of_rank(1, FIRST)).document()["ranks"]
    assert found == {"number": 2, "bound": None, "times": [None, None]}
    text = io.StringIO()
    print_diagnosis(diagnosed(alone, of_rank(1, FIRST)), text)
    assert "2 ranks; how much faster they can be is not measured" in text.getvalue()


def test_a_program_without_ranks_has_none() -> None:
    diagnosis = diagnosed(shared_laps.process(0, 2, [], of_rank(0, FIRST).steps))
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
    found = ranks.measure(run(shared_laps.process(0, 2, laps, steps)), steps[3:])
    assert found is not None
    assert found.times[0] is not None
    assert found.times[0].step_ms == pytest.approx(STEP_MS)
    assert found.times[0].share("shard") == pytest.approx(0.4)


def test_steps_in_which_something_was_tested_do_not_count() -> None:
    first, second = of_rank(0, FIRST), of_rank(1, SECOND)
    for tested in (first, second):
        assert tested.shared_work is not None
        laps = list(tested.shared_work.laps)
        laps[8] = laps[8]._replace(testing_s=1e-3, shard_s=0.01)
        tested.shared_work = replace(tested.shared_work, laps=tuple(laps))
    found = ranks.measure(run(first, second), first.steady_steps)
    assert found is not None
    assert [times and times.phases_ms["shard"] for times in found.times] == pytest.approx([60, 50])


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
    first = shared_laps.process(0, 2, laps, steps, header)
    finding = find("oversubscribed-threads", first, usable_cores=cores)
    assert (None if finding is None else finding.remedy.removeprefix("edit: ")) == remedy


def find(kind: str, *processes: ProcessRecord, usable_cores: float = 2) -> Any:
    found = diagnosed(*processes, usable_cores=usable_cores).findings
    return next((finding for finding in found if finding.kind == kind), None)


def test_exchanges_are_no_python_between_steps() -> None:
    steps = [step(n, n / 10, STEP_MS) for n in range(STEPS)]
    for one in steps:
        one.phases_ms["other"] = 40.0
    laps = [lap(n, (n + 1) / 10, program_s=0.02, communication_s=0.08) for n in range(STEPS)]
    own = shared_laps.process(0, 2, laps, steps)
    finding = find("python-between-steps", own)
    assert finding.share == pytest.approx(0.2)
    assert find("python-between-steps", replace(own, shared_work=None)).share == pytest.approx(0.4)


# The verb

RUNS_RANKS = pytest.mark.skipif(
    isolation.unavailable_reason() is not None, reason=str(isolation.unavailable_reason())
)

PROGRAM = """
import os, signal, sys, torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
optimizer = torch.optim.AdamW(model.parameters())
x, y = torch.randn(32, 64), torch.randint(0, 8, (32,))
for step in range(100_000):
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if sys.argv[1:] == ["killed"] and step == 12 and os.environ["FLATOUT_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    with open("log.txt", "a") as file:
        file.write("a step\\n")
"""


def doctor(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "train.py").write_text(PROGRAM)
    own = ["doctor", "--ranks", "2", "--steps", "20", "--json", "out.json", *words[:-1], "--"]
    return subprocess.run(
        [sys.executable, "-m", "flatout", *own, sys.executable, "train.py", words[-1]],
        env={**os.environ, "FLATOUT_HOME": str(folder / "home"), "OMP_NUM_THREADS": "2"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@RUNS_RANKS
def test_doctor_measures_each_rank(tmp_path: Path) -> None:
    completed = doctor(tmp_path, "lives")
    assert completed.returncode == 0, completed.stderr
    assert sorted(os.listdir(tmp_path)) == ["home", "out.json", "train.py"]
    document = json.loads((tmp_path / "out.json").read_text())
    found = document["ranks"]
    assert found["number"] == 2
    assert 1 < found["bound"] < 2
    for times in found["times"]:
        assert sum(times["shares"].values()) == pytest.approx(1)
        assert min(times["shares"].values()) > 0
    assert "2 ranks give at most" in completed.stdout
    assert "calls of Sequential were shared out" in completed.stdout
    assert "died" not in completed.stderr


@RUNS_RANKS
def test_doctor_says_which_rank_has_died(tmp_path: Path) -> None:
    completed = doctor(tmp_path, "killed")
    assert completed.returncode == 0, completed.stderr
    assert "rank 1 has died: killed by SIGKILL" in completed.stderr
    assert "1  not measured" in completed.stdout


def test_ranks_and_gradients_cannot_be_combined(tmp_path: Path) -> None:
    completed = doctor(tmp_path, "--set", "gradients=on_demand", "lives")
    assert completed.returncode == 2
    assert "the knobs ranks and gradients cannot be used together" in completed.stderr


def test_a_trial_that_flatout_ends_by_itself_is_no_interruption() -> None:
    ended = process.run(["sleep", "60"], dict(os.environ), contained=True, tick=lambda: True)
    assert ended.returncode < 0
