"""The record's format: what is written is read, what is torn or foreign is said."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from flatout.record import (
    COLUMNS,
    PHASES,
    RECORD_VERSION,
    RecordError,
    RecordWriter,
    read_process,
    read_run,
    record_path,
)
from flatout.request import Comparison, Request, RequestError

HEADER = {"kind": "header", "version": RECORD_VERSION, "pid": 1, "rank": None}


def row(**changes: Any) -> list[Any]:
    values: dict[str, Any] = dict.fromkeys(COLUMNS, 0)
    values |= {f"{phase}_ns": 1_000_000 for phase in PHASES}
    values |= {"start_ns": 2_000_000_000, "end_ns": 2_007_000_000, "losses": [0.5], "mark": None}
    return list((values | changes).values())


def writer(path: Path) -> RecordWriter:
    def fail(error: OSError) -> None:
        raise error

    return RecordWriter(path, fail)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    record = writer(record_path(tmp_path, 1))
    record.write(HEADER)
    record.write_turn(row(index=0, data_ns=None, losses=[0.25, float("nan"), None]))
    record.write_turn(row(index=0, evaluation=1, grad=1))
    record.write({"kind": "event", "at_s": 1.5, "what": "skipped", "subject": "a", "why": "b"})
    record.write_turn(row(index=1, arm=1, mark="switched"))
    record.write({"kind": "end", "at_s": 3.0, "reason": "exit"})
    record.close()

    process = read_run(tmp_path).main
    assert process is not None
    first, second = process.steps
    assert first.step_ms == 7.0
    assert first.at_s == 2.0
    assert first.phases_ms == {**dict.fromkeys(PHASES, 1.0), "data": None}
    assert first.losses[0] == 0.25
    assert first.losses[1] != first.losses[1]
    assert first.losses[2] is None
    assert (second.arm, second.mark) == (1, "switched")
    assert [step.grad for step in process.evaluations] == [True]
    assert process.events[0].why == "b"
    assert process.events[0].traceback is None
    assert process.end == {"kind": "end", "at_s": 3.0, "reason": "exit"}


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_last_line_is_ignored(tmp_path: Path, cut: int) -> None:
    record = writer(record_path(tmp_path, 1))
    record.write(HEADER)
    record.write_turn(row())
    record.flush()
    record.write_turn(row(index=1))
    record.close()
    path = record_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-cut])
    assert [step.index for step in read_process(path).steps] == [0]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "is empty"),
        ('{"kind": "turns", "rows": []}\n', "no header"),
        (json.dumps({**HEADER, "version": 99}) + "\n", "version 99"),
        ("not json\n", "not JSON"),
        ("[1]\n", "not a JSON object"),
        (json.dumps(HEADER) + '\n{"kind": "turns", "rows": [[1, 2]]}\n', "not one"),
    ],
)
def test_what_is_no_record_is_said_in_one_sentence(
    tmp_path: Path, content: str, reason: str
) -> None:
    record_path(tmp_path, 1).write_text(content)
    with pytest.raises(RecordError, match=reason):
        read_run(tmp_path)


def test_the_main_process_is_the_one_that_trained_most(tmp_path: Path) -> None:
    for pid, steps in ((1, 0), (2, 3), (3, 1)):
        record = writer(record_path(tmp_path, pid))
        record.write({**HEADER, "pid": pid})
        for index in range(steps):
            record.write_turn(row(index=index))
        record.close()
    assert [process.header["pid"] for process in read_run(tmp_path).processes] == [2, 3, 1]


def test_a_full_disk_is_said_once_and_nothing_raises() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    errors: list[OSError] = []
    record = RecordWriter(Path("/dev/full"), errors.append)
    for _ in range(3):
        record.write(HEADER)
        record.flush()
    record.close()
    assert [error.errno for error in errors] == [errno.ENOSPC]


def test_a_record_that_nobody_wrote_to_leaves_no_file(tmp_path: Path) -> None:
    writer(record_path(tmp_path, 1)).close()
    assert list(tmp_path.iterdir()) == []


def test_request_round_trip(tmp_path: Path) -> None:
    request = Request(
        settings={"precision": "bf16"},
        stop_steps=5,
        comparison=Comparison(arms=({}, {"optimizer": "fused"}), rounds=3),
        seed=7,
    )
    request.write(tmp_path)
    assert Request.read(tmp_path) == request


@pytest.mark.parametrize("text", ["", "[]", '{"version": 99}', '{"version": 1, "unknown": 2}'])
def test_a_request_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "request.json").write_text(text)
    with pytest.raises(RequestError):
        Request.read(tmp_path)
