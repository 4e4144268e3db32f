"""The record's format: what is written is read, what is torn or foreign is said."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout.intercept import _watch
from flatout.wire.header import RECORD_VERSION, Header
from flatout.wire.lines import AgentEvent, End
from flatout.wire.record import RecordError, StepCounter, read_process, read_run
from flatout.wire.request import Comparison, Inspection, Request, RequestError
from flatout.wire.turns import (
    ARM,
    BACKWARD,
    BEGIN,
    DATA,
    END,
    FORWARD,
    MARK,
    MARKS,
    NOTE,
    OPTIMIZER,
    PHASES,
    USAGE,
)
from flatout.wire.writer import RecordWriter, reason_record_incomplete, record_path

HEADER = {"kind": "header", "version": RECORD_VERSION, "pid": 1, "rank": None, "started_ns": 7}
NET, OPTIMIZER_ID = 2**46 + 16, 2**47 - 8
MS = 1_000_000


class Program:
    """Notes what a program would: batches, root forwards, backwards and optimizer steps."""

    def __init__(self) -> None:
        self.log = _watch.Log()
        self.now_ns = 10**15
        self.faults = 0

    def phase(self, phase: int, ms: int, flags: int = 0, identity: int = 0) -> None:
        self.log.append(BEGIN, phase, flags, self.now_ns, identity)
        self.now_ns += ms * MS
        self.log.append(END, phase, 0, self.now_ns, identity)

    def step(self, fetches: bool = True) -> None:
        if fetches:
            self.phase(DATA, 2)
        self.phase(FORWARD, 4, flags=3, identity=NET)
        self.phase(BACKWARD, 3, flags=1)
        self.faults += 5
        self.log.append(USAGE, 0, 0, self.faults, 0, 2**30)
        self.phase(OPTIMIZER, 1, identity=OPTIMIZER_ID)

    def evaluation(self) -> None:
        self.phase(FORWARD, 4, flags=0, identity=NET)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    program = Program()
    record = RecordWriter(tmp_path, 1)
    record.write(Header(pid=1, started_ns=program.now_ns - 2_000_000_000))
    program.step()
    record.write_events(program.log.take_packed())
    record.write_losses([0.25], None)
    record.write(AgentEvent(at_s=1.5, what="skipped", subject="a", why="b"))
    program.phase(DATA, 1)
    program.log.append(NOTE, ARM, 0, 1)
    program.log.append(NOTE, MARK, 0, MARKS.index("switched"))
    program.step(fetches=False)
    program.step()
    program.log.append(NOTE, ARM, 0, -1)
    program.log.append(NOTE, MARK, 0, 0)
    program.evaluation()
    program.step()
    record.write_events(program.log.take_packed())
    record.write_losses([float("nan"), 0.125], 4096)
    record.write(End(at_s=3.0, reason="exit"))
    record.flush()

    process = read_run(tmp_path).main
    assert process is not None
    first, second, third, fourth = process.steps
    assert first.step_ms == 10.0
    assert first.at_s == 2.0
    assert first.phases_ms == {
        **dict.fromkeys(PHASES, 0.0),
        "data": 2.0,
        "transfer": None,
        "forward": 4.0,
        "backward": 3.0,
        "optimizer": 1.0,
    }
    assert first.losses == (0.25,)
    assert first.peak_device_bytes is None
    assert (first.minor_faults, first.peak_rss_bytes) == (None, 2**30)
    assert (first.forwards, first.backwards, first.updates, first.grad) == (1, 1, 1, True)
    assert second.minor_faults == 5
    assert second.losses[0] != second.losses[0]
    assert second.peak_device_bytes == 4096
    assert third.losses == (0.125,)
    assert [(step.arm, step.mark) for step in process.steps] == [
        (None, None),
        (1, "switched"),
        (None, None),  # it ended with the evaluation pass, after the note
        (None, None),
    ]
    assert fourth.losses == (None,), "its value never came"
    assert [(step.grad, step.step_ms) for step in process.evaluations] == [(False, 4.0)]
    assert process.events[0].why == "b"
    assert process.events[0].traceback is None
    assert process.end == End(at_s=3.0, reason="exit")


def test_a_process_that_replaced_itself_begins_anew_in_the_same_file(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        program = Program()
        record = RecordWriter(tmp_path, 1)
        record.write(Header(pid=1, started_ns=7))
        program.step()
        record.write_events(program.log.take_packed())
        record.write_losses([value], None)
        record.flush()
    assert [step.losses for step in read_process(record_path(tmp_path, 1)).steps] == [
        (1.0,),
        (2.0,),
    ]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    program = Program()
    record = RecordWriter(tmp_path, 1)
    record.write(Header(pid=1, started_ns=7))
    program.step()
    record.write_events(program.log.take_packed())
    record.flush()
    for _ in range(3):
        program.step()
    record.write_events(program.log.take_packed())
    record.flush()
    path = record_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [step.index for step in read_process(path).steps] == [0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ('{"kind": "trace", "packed": ""}\n', "no header"),
        (json.dumps({**HEADER, "version": 99}) + "\n", "version 99"),
        ("not json\n", "not JSON"),
        ("[1]\n", "not a JSON object"),
        (json.dumps(HEADER) + '\n{"kind": "trace"}\n', "cannot be unpacked"),
        (json.dumps(HEADER) + '\n{"kind": "trace", "packed": "/w=="}\n', "cannot be unpacked"),
        (json.dumps(HEADER) + '\n{"kind": "trace", "packed": "*"}\n', "cannot be unpacked"),
        (json.dumps(HEADER) + '\n{"kind": "losses", "packed": "AAAA"}\n', "cannot be unpacked"),
    ],
)
def test_what_is_no_record_is_said_in_one_sentence(
    tmp_path: Path, content: str, reason: str
) -> None:
    record_path(tmp_path, 1).write_text(content)
    with pytest.raises(RecordError, match=reason):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1\n", "not a JSON object"),
        (json.dumps(HEADER) + "\n[]\n", "not a JSON object"),
        (json.dumps(HEADER) + "\n" + "[" * 100_000 + "\n", "line 2"),
        (json.dumps({**HEADER, "version": 99}) + "\n", "version 99"),
        ('{"kind": "trace", "packed": ""}\n', "no header"),
        (json.dumps(HEADER) + '\n{"kind": "trace", "packed": "*"}\n', "cannot be unpacked"),
    ],
)
def test_steps_are_not_counted_in_what_is_no_record(
    tmp_path: Path, content: str, reason: str
) -> None:
    record_path(tmp_path, 1).write_text(content)
    with pytest.raises(RecordError, match=reason):
        StepCounter(tmp_path).count()


def test_the_main_process_is_the_one_that_trained_most(tmp_path: Path) -> None:
    for pid, steps in ((1, 0), (2, 3), (3, 1)):
        record = RecordWriter(tmp_path, pid)
        record.write(Header(pid=pid, started_ns=7))
        program = Program()
        for _ in range(steps):
            program.step()
        record.write_events(program.log.take_packed())
        record.flush()
    assert [process.header.pid for process in read_run(tmp_path).processes] == [2, 3, 1]


def test_a_full_disk_is_said_in_the_run_directory_and_nothing_raises(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    record_path(tmp_path, 5).symlink_to("/dev/full")
    record = RecordWriter(tmp_path, 5)
    assert reason_record_incomplete(tmp_path) is None
    for _ in range(3):
        record.write(Header(pid=1, started_ns=7))
        record.flush()
    assert reason_record_incomplete(tmp_path) == os.strerror(errno.ENOSPC)


def test_a_run_directory_that_is_gone_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = RecordWriter(tmp_path / "gone", 5)
    for _ in range(3):
        record.write(Header(pid=1, started_ns=7))
        record.flush()
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("flatout: the record stops, the program goes on: ")


def test_a_record_that_nobody_wrote_to_leaves_no_file(tmp_path: Path) -> None:
    RecordWriter(tmp_path, 1).flush()
    assert list(tmp_path.iterdir()) == []


def test_request_round_trip(tmp_path: Path) -> None:
    request = Request(
        settings={"precision": "bf16"},
        stop_steps=5,
        comparison=Comparison(arms=({}, {"optimizer": "fused"}), rounds=3),
        seed=7,
        inspection=Inspection(gradient_steps=3, state=True, outputs=2),
    )
    request.write(tmp_path)
    assert Request.read(tmp_path) == request


@pytest.mark.parametrize("text", ["", "[]", '{"version": 99}', '{"version": 1, "unknown": 2}'])
def test_a_request_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(RequestError):
        Request.read(tmp_path)


def test_a_module_is_named_in_the_record(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\n")  # before the module's name is known
    (package / "train.py").write_text(
        "import torch\nnet = torch.nn.Linear(2, 1)\nnet(torch.ones(1, 2)).sum().backward()\n"
    )
    subprocess.run(
        [sys.executable, "-m", "flatout", "run", "--", sys.executable, "-m", "package.train"],
        cwd=tmp_path,
        env={**os.environ, "FLATOUT_HOME": str(tmp_path / "home")},
        check=True,
        capture_output=True,
    )
    (run_directory,) = (tmp_path / "home" / "runs").iterdir()
    process = read_run(run_directory).main
    assert process is not None
    assert process.header.program == "package.train"
