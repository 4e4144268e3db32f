"""Programs of other frameworks, bare and under ``flatout run``: the same to the last bit."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from compare import Outcome, compare, differences

from flatout.record import RunRecord

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
FRAMEWORKS = Path(
    os.environ.get("FLATOUT_TEST_FRAMEWORKS_PYTHON", ROOT / ".venv-frameworks/bin/python")
)
TIMM = Path(os.environ.get("FLATOUT_TEST_TIMM_PYTHON", ROOT / ".venv-timm/bin/python"))


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


def counts(record: RunRecord) -> list[tuple[int, int, int]]:
    assert record.main is not None
    assert not [event for event in record.main.events if event.what == "failed"]
    return [(s.forwards, s.backwards, s.updates) for s in record.main.steps]


def last_loss(record: RunRecord) -> float | None:
    assert record.main is not None
    return record.main.steps[-1].losses[-1]


def test_the_comparison_sees_a_difference() -> None:
    assert differences("loss 1.5 in 3 s", "loss 1.5 in 4 s", "loss 1.5 in 5 s") == []
    assert differences("loss 1.5 in 3 s", "loss 1.5 in 4 s", "loss 1.6 in 5 s")
    assert differences("a b", "a b", "a b c")


@pytest.mark.frameworks
def test_hugging_face_trainer(template: Path, tmp_path: Path) -> None:
    own, record = compare([str(needs(FRAMEWORKS)), "hf_trainer.py"], template, tmp_path)
    assert own.returncode == 0
    assert counts(record) == [(2, 2, 1)] * 12
    assert record.main is not None
    assert len(record.main.evaluations) == 4
    losses = [loss for step in record.main.steps for loss in step.losses]
    assert all(loss is not None for loss in losses)
    mean = sum(loss for loss in losses if loss is not None) / len(losses)
    # Trainer divides each micro-batch's loss by their number before it calls backward.
    assert 2 * mean == pytest.approx(printed_losses(own)[-1], rel=1e-5)


@pytest.mark.frameworks
def test_accelerate(template: Path, tmp_path: Path) -> None:
    launcher = needs(FRAMEWORKS).parent / "accelerate"
    command = [
        *(str(launcher), "launch", "--cpu", "--num_machines", "1", "--mixed_precision", "no"),
        *("--dynamo_backend", "no", "--num_processes", "1"),
        "accelerate_script.py",
    ]
    own, record = compare(command, template, tmp_path)
    assert own.returncode == 0, own.stderr
    assert len(printed_losses(own)) == 2
    assert counts(record) == [(2, 2, 1)] * 16


@pytest.mark.frameworks
def test_lightning(template: Path, tmp_path: Path) -> None:
    own, record = compare([str(needs(FRAMEWORKS)), "lightning_script.py"], template, tmp_path)
    assert own.returncode == 0, own.stderr
    assert counts(record) == [(1, 1, 1)] * 32
    assert record.main is not None
    assert len(record.main.evaluations) == 2 + 2 * 4
    assert last_loss(record) == printed_losses(own)[-1]


@pytest.mark.frameworks
def test_torchrun_with_two_ranks(template: Path, tmp_path: Path) -> None:
    launcher = needs(FRAMEWORKS).parent / "torchrun"
    command = [
        *(str(launcher), "--nproc_per_node", "2", "--rdzv_backend", "c10d"),
        *("--rdzv_endpoint", "localhost:0", "torchrun_ddp.py"),
    ]
    own, record = compare(command, template, tmp_path)
    assert own.returncode == 0, own.stderr
    trained = [process for process in record.processes if process.trains]
    assert sorted(process.header["rank"] for process in trained) == [0, 1]
    assert record.main is not None
    assert record.main.header["rank"] == 0
    assert counts(record) == [(1, 1, 1)] * 16
    assert len(printed_losses(own)) == 2


@pytest.mark.frameworks
def test_timm(template: Path, tmp_path: Path) -> None:
    own, record = compare([str(needs(TIMM)), "timm_script.py"], template, tmp_path)
    assert own.returncode == 0, own.stderr
    assert record.main is not None
    losses = [loss for step in record.main.steps for loss in step.losses]
    assert losses == printed_losses(own)
    assert counts(record) == [(1, 1, 1)] * 8
