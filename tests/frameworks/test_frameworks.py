"""The examples and programs of other frameworks, bare and under ``flatout run``: the same to the
last bit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from compare import Outcome, compare, run

from flatout.wire.record import ProcessRecord, RunRecord

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
            assert step.phases_ms["optimizer"] or not step.updates
    assert record.main is not None
    return record.main


def steps(process: ProcessRecord) -> list[Counts]:
    return [(step.forwards, step.backwards, step.updates) for step in process.steps]


def updates(process: ProcessRecord) -> list[Counts]:
    """The steps up to each optimizer step, added up: where gradients accumulate, a step is a
    micro-batch, but for the first ones."""
    found, sums = [], (0, 0, 0)
    for forwards, backwards, update in steps(process):
        sums = (sums[0] + forwards, sums[1] + backwards, sums[2] + update)
        if update:
            found.append(sums)
            sums = (0, 0, 0)
    assert sums == (0, 0, 0)
    return found


def evaluations(process: ProcessRecord) -> list[Counts]:
    return [(step.forwards, step.backwards, step.updates) for step in process.evaluations]


# Training with its evaluation, then inference from what it saved.
EXAMPLES = {
    "cnn": ("image", "train.py --steps 30 --workers 2 --save it.pt", "infer.py it.pt"),
    "vit": ("image", "train.py --model vit --steps 30 --save it.pt", "infer.py it.pt"),
    "language": (
        "language",
        "train.py --steps 20 --evaluate-every 10 --log-every 1 --save it.pt",
        "infer.py it.pt --length 40",
    ),
    "speech": (
        "speech",
        "train.py --steps 6 --data DATA --save it.pt",
        "infer.py it.pt DATA/en/vm-goodbye.wav DATA/fr/vm-goodbye.wav",
    ),
}


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recordings of the speech example, fetched by itself."""
    data = tmp_path_factory.mktemp("recordings")
    fetched = subprocess.run(
        [sys.executable, "train.py", "--epochs", "0", "--data", data],
        cwd=ROOT / "examples/speech",
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot fetch" in fetched.stderr:
        pytest.skip(fetched.stderr.strip().splitlines()[-1])
    assert fetched.returncode == 0, fetched.stderr
    return data


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    example, training, inference = EXAMPLES[name]
    template = tmp_path / "template"
    shutil.copytree(
        ROOT / "examples" / example, template, ignore=shutil.ignore_patterns("__pycache__")
    )
    script = f"{sys.executable} {training} && {sys.executable} {inference}"
    if name == "speech":
        script = script.replace("DATA", str(request.getfixturevalue("recordings")))
    own, record = compare(
        ["sh", "-c", script], template, tmp_path, Path(sys.executable), bare_runs=1
    )
    assert own.returncode == 0, own.stderr
    assert "it.pt" in own.files
    main = checked(record)
    printed = re.findall(r"^step \d+ loss (\S+)", own.stdout, re.MULTILINE)
    assert printed
    assert set(printed) <= {f"{loss:.6f}" for loss in recorded_losses(main)}
    (inferring,) = (process for process in record.processes if not process.trains)
    assert inferring.evaluations


def test_hugging_face_trainer(template: Path, tmp_path: Path) -> None:
    python = needs(FRAMEWORKS)
    own, record = compare([str(python), "hf_trainer.py"], template, tmp_path, python)
    assert own.returncode == 0, own.stderr
    main = checked(record)
    assert updates(main) == [(2, 2, 1)] * 12
    assert (1, 1, 0) in steps(main)
    assert evaluations(main) == [(1, 0, 0)] * 4
    assert recorded_losses(main) == printed_losses(own)


@pytest.mark.parametrize(
    "script", ["hf_trainer.py", "hf_padded.py", "hf_padded.py smooth", "accelerate_script.py"]
)
def test_two_ranks(script: str, template: Path, tmp_path: Path) -> None:
    python = needs(FRAMEWORKS)
    command = [str(python), *script.split()]
    alone = run(command, template, tmp_path / "alone", None)
    assert alone.returncode == 0, alone.stderr
    flatout = [sys.executable, "-m", "flatout", "run", "--ranks", "2", "--"]
    shared = run([*flatout, *command], template, tmp_path / "shared", None)
    assert shared.returncode == 0, shared.stderr
    assert re.search(r"ranks: \d+ calls of \w+ were shared out$", shared.stderr, re.MULTILINE)
    assert printed_losses(shared) == pytest.approx(printed_losses(alone), rel=1e-5)
    assert printed_losses(alone)


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
    assert all(updates(process) == [(2, 2, 1)] * (16 // processes) for process in trained)
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
    assert [process.header.rank for process in trained] == [0, 1]
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
