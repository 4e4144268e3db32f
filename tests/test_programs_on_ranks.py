"""Unedited programs with ``--ranks`` train as they do alone: the same losses to the rounding of
float32, the same words and files, the same exit status."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flatout.wire.record import read_run

ROOT = Path(__file__).parents[1]
FRAMEWORKS = Path(
    os.environ.get("FLATOUT_TEST_FRAMEWORKS_PYTHON", ROOT / ".venv-frameworks/bin/python")
)

pytestmark = pytest.mark.ranks

NUMBER = r"[-+]?\d+\.\d+(?:e[-+]?\d+)?"

TIME = r"'\w+_(?:runtime|per_second)': '[^']*'"
"""What a Trainer prints of its times."""

ROUNDING = 2e-4
"""Relative difference of losses, by the rounding of float32 in a few steps."""


@dataclass(frozen=True)
class Program:
    """A program to run.

    Attributes:
        command: its file from the root of the repository, and its options.
        is_of_framework: whether it needs the environment of the frameworks.
        is_shared: whether its calls are shared out.
        prepare: options of a run before, alone; empty: there is none.
    """

    command: str
    is_of_framework: bool = False
    is_shared: bool = True
    prepare: str = ""


PROGRAMS = {
    "gpt": Program(
        "examples/language/train.py --steps 6 --log-every 1 --evaluate-every 3 --save it.pt"
    ),
    "cnn": Program("examples/image/train.py --steps 6 --save it.pt"),
    "vit": Program("examples/image/train.py --model vit --steps 6 --save it.pt"),
    "speech": Program("examples/speech/train.py --steps 4 --save it.pt"),
    "mlp": Program("benchmarks/programs/mlp.py --steps 6"),
    "lstm_language": Program("benchmarks/programs/lstm_language.py --steps 4"),
    "lstm_by_hand": Program("benchmarks/programs/lstm_by_hand.py --steps 4"),
    # Adam makes rounding errors of small gradients as large as any: after a third step, losses
    # differ by 3e-4 (in float64 by less than 1e-10).
    "dcgan": Program("benchmarks/programs/dcgan.py --steps 2 --width 32"),
    "vae": Program("benchmarks/programs/vae.py --steps 6"),
    "diffusion": Program("benchmarks/programs/diffusion.py --steps 4"),
    "recommender": Program("benchmarks/programs/recommender.py --steps 6", is_shared=False),
    "jpeg": Program("benchmarks/programs/jpeg.py --steps 6"),
    "classify_folder": Program(
        "benchmarks/programs/classify_folder.py images --steps 4 --batch-size 16",
        prepare="images --prepare --training-steps 4 --files 40",
    ),
    "bucketed": Program("benchmarks/programs/bucketed.py --steps 6"),
    "python_bound": Program("benchmarks/programs/python_bound.py --steps 6"),
    "hf_encoder": Program("benchmarks/programs/hf_encoder.py --steps 4", is_of_framework=True),
    "lightning_cnn": Program(
        "benchmarks/programs/lightning_cnn.py --steps 3", is_of_framework=True
    ),
    "trainer": Program("tests/frameworks/programs/hf_trainer.py", is_of_framework=True),
    "accelerate": Program("tests/frameworks/programs/accelerate_script.py", is_of_framework=True),
    "lightning": Program("tests/frameworks/programs/lightning_script.py", is_of_framework=True),
}


@dataclass(frozen=True)
class Outcome:
    """What a program has left.

    Attributes:
        losses: of all steps.
        words: its standard output with a place for each number that is not whole.
        numbers: those numbers.
        files: names of the files that it has written.
        flatout_lines: what flatout has said at its end.
    """

    losses: list[float]
    words: str
    numbers: list[float]
    files: set[str]
    flatout_lines: str


def run(program: Program, ranks: int, folder: Path) -> Outcome:
    python = FRAMEWORKS if program.is_of_framework else Path(sys.executable)
    if not python.exists():
        pytest.skip(f"{python} is not there: make frameworks installs it")
    file, *options = program.command.split()
    work = folder / f"ranks-{ranks}" / "work"
    shutil.copytree(
        (ROOT / file).parent, work, ignore=shutil.ignore_patterns("__pycache__", "work")
    )
    if program.prepare:
        preparing = [str(python), Path(file).name, *program.prepare.split()]
        subprocess.run(preparing, cwd=work, check=True, capture_output=True)
    before = {path.name for path in work.iterdir()}
    home = folder / f"home-{ranks}"
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "FLATOUT_HOME": str(home),
        # Each rank gets its part: one process and a rank compute with one thread.
        "OMP_NUM_THREADS": str(ranks),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    own = ["run", *(["--ranks", str(ranks)] if ranks > 1 else []), "--"]
    command = [sys.executable, "-m", "flatout", *own, str(python), Path(file).name, *options]
    done = subprocess.run(
        command, cwd=work, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if "cannot fetch" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    stdout = re.sub(TIME, "TIME", done.stdout)
    [directory] = (home / "runs").iterdir()
    main = read_run(directory).main
    assert main is not None
    return Outcome(
        [loss for step in main.steps for loss in step.losses if loss is not None],
        re.sub(NUMBER, "NUMBER", stdout),
        [float(text) for text in re.findall(NUMBER, stdout)],
        {path.name for path in work.iterdir()} - before,
        "".join(re.findall(r"^flatout: .*\n", done.stderr, re.MULTILINE)),
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """What the programs leave without ranks; filled as they are needed."""
    return {}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("name", PROGRAMS)
def test_trains_as_alone(name: str, ranks: int, alone: dict[str, Outcome], tmp_path: Path) -> None:
    program = PROGRAMS[name]
    if name not in alone:
        alone[name] = run(program, 1, tmp_path)
    expected = alone[name]
    found = run(program, ranks, tmp_path)
    assert expected.losses or "counts" in expected.words
    assert found.losses == pytest.approx(expected.losses, rel=ROUNDING)
    assert found.words == expected.words
    assert found.numbers == pytest.approx(expected.numbers, rel=ROUNDING, abs=2e-4)
    assert found.files == expected.files
    assert ("were shared out" in found.flatout_lines) == program.is_shared, found.flatout_lines
