"""Programs of other frameworks, bare and under ``flatout run``: the same to the last bit."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from compare import Outcome, compare

from flatout.record import ProcessRecord, RunRecord

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
FRAMEWORKS = Path(
    os.environ.get("FLATOUT_TEST_FRAMEWORKS_PYTHON", ROOT / ".venv-frameworks/bin/python")
)
TIMM = Path(os.environ.get("FLATOUT_TEST_TIMM_PYTHON", ROOT / ".venv-timm/bin/python"))

pytestmark = pytest.mark.frameworks

Counts = tuple[int, int, int]


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    shutil.copytree(PROGRAMS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def needs(python: Path) -> Path:
    if not python.exists():
        pytest.skip(f"{python} is not there: make frameworks installs it")
    return python


def printed_losses(outcome: Outcome) -> list[float]:
    return [float(text) for text in re.findall(r"\bloss (\S+)", outcome.stdout)]


def recorded_losses(process: ProcessRecord) -> list[float | None]:
    return [loss for step in process.steps for loss in step.losses]


def checked(record: RunRecord) -> ProcessRecord:
    """The main process, once what must hold in every process of every record does."""
    for process in record.processes:
        assert not [event for event in process.events if event.what == "failed"]
        for step in [*process.steps, *process.evaluations]:
            phases_ms = sum(ms for ms in step.phases_ms.values() if ms is not None)
            assert phases_ms == pytest.approx(step.step_ms)
            assert step.phases_ms["forward"]
        for step in process.steps:
            assert step.phases_ms["backward"]
            assert step.phases_ms["optimizer"]
    assert record.main is not None
    return record.main


def steps(process: ProcessRecord) -> list[Counts]:
    return [(step.forwards, step.backwards, step.updates) for step in process.steps]


def evaluations(process: ProcessRecord) -> list[Counts]:
    return [(step.forwards, step.backwards, step.updates) for step in process.evaluations]


def test_hugging_face_trainer(template: Path, tmp_path: Path) -> None:
    python = needs(FRAMEWORKS)
    own, record = compare([str(python), "hf_trainer.py"], template, tmp_path, python)
    assert own.returncode == 0, own.stderr
    main = checked(record)
    assert steps(main) == [(2, 2, 1)] * 12
    assert evaluations(main) == [(1, 0, 0)] * 4
    assert recorded_losses(main) == printed_losses(own)


# Two processes on CPUs `accelerate launch` leaves to torchrun and MPI.
@pytest.mark.parametrize(("launcher", "processes"), [("accelerate launch", 1), ("torchrun", 2)])
def test_accelerate(launcher: str, processes: int, template: Path, tmp_path: Path) -> None:
    python = needs(FRAMEWORKS)
    options = {
        "accelerate launch": "--cpu --num_machines 1 --mixed_precision no --dynamo_backend no "
        "--num_processes 1",
        "torchrun": "--nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0",
    }
    command = [
        *f"{python.parent}/{launcher} {options[launcher]}".split(),
        "accelerate_script.py",
    ]
    own, record = compare(command, template, tmp_path, python)
    assert own.returncode == 0, own.stderr
    main = checked(record)
    trained = [process for process in record.processes if process.trains]
    assert len(trained) == processes
    assert all(steps(process) == [(2, 2, 1)] * (16 // processes) for process in trained)
    # Accelerate divides each loss by the number of micro-batches before it calls backward.
    assert recorded_losses(main) == [loss / 2 for loss in printed_losses(own)]


def test_lightning(template: Path, tmp_path: Path) -> None:
    python = needs(FRAMEWORKS)
    own, record = compare([str(python), "lightning_script.py"], template, tmp_path, python)
    assert own.returncode == 0, own.stderr
    main = checked(record)
    assert steps(main) == [(1, 1, 1)] * 32
    assert evaluations(main) == [(1, 0, 0)] * (2 + 2 * 4)  # the sanity check, then every epoch
    assert recorded_losses(main) == printed_losses(own)


def test_torchrun_with_two_ranks(template: Path, tmp_path: Path) -> None:
    python = needs(FRAMEWORKS)
    command = [
        *(str(python.parent / "torchrun"), "--nproc_per_node", "2", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", "localhost:0", "torchrun_ddp.py"),
    ]
    own, record = compare(command, template, tmp_path, python)
    assert own.returncode == 0, own.stderr
    main = checked(record)
    trained = [process for process in record.processes if process.trains]
    assert [process.header["rank"] for process in trained] == [0, 1]
    assert all(steps(process) == [(1, 1, 1)] * 16 for process in trained)
    assert recorded_losses(main) == printed_losses(own)


def test_timm(template: Path, tmp_path: Path) -> None:
    python = needs(TIMM)
    own, record = compare([str(python), "timm_script.py"], template, tmp_path, python)
    assert own.returncode == 0, own.stderr
    main = checked(record)
    assert steps(main) == [(1, 1, 1)] * 8
    assert evaluations(main) == [(1, 0, 0)]
    assert recorded_losses(main) == printed_losses(own)
