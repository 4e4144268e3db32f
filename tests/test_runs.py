"""Run directories: how many are kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flatout.launch import runs

NOBODY = 2**22 + 1
"""A process id beyond the kernel's largest (proc(5), pid_max)."""


def old_run(folder: Path, number: int, pid: int = NOBODY, size: int = 10) -> Path:
    directory = folder / f"20260101-{number:06}-{pid}-abcd"
    directory.mkdir(parents=True)
    (directory / "record-1.jsonl").write_bytes(bytes(size))
    return directory


def test_the_oldest_go_beyond_a_number(tmp_path: Path) -> None:
    old = [old_run(tmp_path, number) for number in range(runs.KEPT_RUNS + 3)]
    runs.clear_old(tmp_path, runs.KEPT_RUNS, runs.KEPT_BYTES)
    assert sorted(tmp_path.iterdir()) == old[3:]


def test_the_oldest_go_beyond_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "KEPT_BYTES", 100)
    old = [old_run(tmp_path, number, size=40) for number in range(4)]
    runs.clear_old(tmp_path, runs.KEPT_RUNS, runs.KEPT_BYTES)
    assert sorted(tmp_path.iterdir()) == old[2:]


def test_a_run_that_is_still_going_on_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "KEPT_RUNS", 0)
    going_on = old_run(tmp_path, 0, pid=os.getpid())
    old_run(tmp_path, 1)
    runs.clear_old(tmp_path, runs.KEPT_RUNS, runs.KEPT_BYTES)
    assert list(tmp_path.iterdir()) == [going_on]


def test_a_new_run_clears_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path))
    old = [old_run(tmp_path / "runs", number) for number in range(runs.KEPT_RUNS + 1)]
    new = runs.new_run_directory()
    assert new.is_dir()
    assert not old[0].exists()
    assert old[1].exists()
