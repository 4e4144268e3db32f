"""Two runs that take turns: real programs, whose steps write down when they were made."""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import pytest

from flatout import launch
from flatout.agent import relay as agent_relay
from flatout.tune import trial
from flatout.tune.journal import Entry
from flatout.tune.pairs import size_relay
from flatout.tune.trial import RelayFailedError, Trials
from flatout.wire.header import Header
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Relay, Request

PROGRAM = """
import os, sys, time
import torch
net = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
for number in range(int(sys.argv[2])):
    net(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    with open(sys.argv[1], "a") as file:
        file.write(f"{os.getpid()}\\n")
    if number == 6 and sys.argv[3] == "one fails":
        try:
            open(sys.argv[1] + "-failed", "x")
        except FileExistsError:
            time.sleep(600)
        else:
            sys.exit(3)
"""

RELAY = Relay("", 0, block_steps=4, discard_steps=1, warmup_steps=2, blocks=3)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(
    tmp_path: Path, steps: int, how: str = "both run"
) -> tuple[launch.Finished, launch.Finished]:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    command = [sys.executable, str(script), str(tmp_path / "steps"), str(steps), how]
    requests = (Request(seed=1), Request(seed=1))
    return launch.start_relay(command, requests, RELAY, timeout_seconds=120)


def test_blocks_of_two_processes_alternate(tmp_path: Path) -> None:
    both = start(tmp_path, 1000)
    for place, finished in enumerate(both):
        assert finished.returncode == 0
        process = finished.read_record().main
        assert process is not None
        marks = [(step.arm, step.mark) for step in process.steps]
        block = [(place, "switched"), *[(place, None)] * 3]
        assert marks == [(place, "first")] * 2 + block * 3
        check_that_readings_enclose_blocks(process)
    lines = (tmp_path / "steps").read_text().split()
    # Warm-ups first, one after the other; where a step ends here, its block may have ended already.
    turns = [pid for pid, _ in groupby(lines)]
    assert len(set(turns)) == 2
    assert 6 <= len(turns) <= 9


def check_that_readings_enclose_blocks(process: ProcessRecord) -> None:
    """A reading of CPU time right before and right after each block tells of nothing else."""
    blocks = [list(block) for _, block in groupby(process.steady_steps, lambda step: step.block)]
    assert len(blocks) == 3
    times = [usage.at_s for usage in process.usage]
    for block in blocks:
        start_s, end_s = block[0].at_s, block[-1].end_s
        assert max(at_s for at_s in times if at_s <= start_s) > start_s - 1
        assert min(at_s for at_s in times if at_s >= end_s) >= end_s
    assert times == sorted(times)
    assert process.usage[-1].own_s > process.usage[0].own_s


@pytest.mark.parametrize(("place", "last"), [(0, ["done-1-1", "done-1-2"]), (1, ["done-0-2"])])
def test_the_first_stays_until_the_second_has_made_its_last_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int, last: list[str]
) -> None:
    """What a process does at its end would slow what is being timed beside it."""
    waited: list[str] = []
    monkeypatch.setattr(agent_relay, "_wait_for", lambda _, name, __: waited.append(name))
    session = SimpleNamespace(counts_as_step=lambda _: True, add_pause=lambda _: None)
    relay = Relay(str(tmp_path), place, block_steps=2, discard_steps=1, warmup_steps=1, blocks=2)
    usage = SimpleNamespace(note=lambda with_work=False: None)
    runner = agent_relay.Runner(session, relay, usage)  # type: ignore[arg-type]
    turn = SimpleNamespace(start_ns=0, end_ns=1)
    ended = [runner.at_boundary(turn) for _ in range(5)]  # type: ignore[arg-type]
    assert ended == [False] * 4 + [True]
    assert waited[-len(last) :] == last


def test_the_one_goes_on_when_the_other_has_ended(tmp_path: Path) -> None:
    both = start(tmp_path, 8)
    for finished in both:
        assert finished.returncode == 0
        process = finished.read_record().main
        assert process is not None
        assert len(process.steps) == 8
        assert process.end is not None
        assert process.end.reason == "exit"


def test_when_one_fails_the_other_is_ended(tmp_path: Path) -> None:
    both = start(tmp_path, 1000, "one fails")
    assert sorted(finished.returncode for finished in both) == [-15, 3]
    assert not any(finished.timed_out for finished in both)


@pytest.mark.parametrize(
    ("steps", "step_s", "block_steps", "discard_steps"),
    [
        (200, 0.04, 5, 1),  # a turn of 0.2 s
        (2000, 0.001, 100, 20),  # 0.1 s, or the caches would stay cold
        (60, 0.001, 7, 1),  # few steps were asked for: short turns, but eight of them
        (20, 0.2, 5, 1),
        (11, 2.0, 1, 0),  # slow steps: step by step
    ],
)
def test_turns_outlast_what_has_gone_cold(
    steps: int, step_s: float, block_steps: int, discard_steps: int
) -> None:
    relay = size_relay(steps, step_s)
    assert (relay.block_steps, relay.discard_steps) == (block_steps, discard_steps)
    assert relay.warmup_steps + relay.blocks * relay.block_steps == steps
    assert 3 <= relay.warmup_steps < 3 + block_steps
    assert relay.blocks >= min(8, (steps - 3) // 5)


def test_a_run_that_was_terminated_from_outside_is_the_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its partner came to its end, so the message must name this run and its own failure."""
    sides = {"one": None, "other": "it was killed by signal 15"}
    entries = tuple(Entry(run, 1.0, True, failure, "", 1.0) for run, failure in sides.items())
    opened = SimpleNamespace(runs=tmp_path, take_next=lambda *_: entries)
    trials = Trials(["python"], opened, isolate=False)  # type: ignore[arg-type]
    process = ProcessRecord(tmp_path, Header())
    record = SimpleNamespace(main=process, imported_files=())
    monkeypatch.setattr(trial, "read_run", lambda _: record)
    with pytest.raises(RelayFailedError, match="killed by signal 15") as caught:
        trials.run_two((Request(), Request()), RELAY, 10.0)
    assert caught.value.place == 1
