"""The programs of the benchmarks: they train, and repeat themselves bit for bit."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ROOT / "benchmarks" / "programs"
FRAMEWORKS = Path(
    os.environ.get("FLATOUT_TEST_FRAMEWORKS_PYTHON", ROOT / ".venv-frameworks/bin/python")
)
BARE = {
    "jpeg": ["--steps", "11", "--files", "32"],
    "lstm_by_hand": ["--steps", "11"],
    "python_bound": ["--steps", "101"],
}


def printed_steps(python: Path, name: str, folder: Path, options: list[str]) -> list[list[str]]:
    """The lines with a step of two runs from one seed, side by side on a thread each."""
    command = [str(python), str(PROGRAMS / f"{name}.py"), "--seed", "1", *options]
    started = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = []
    for process in started:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        outputs.append(re.findall(r"^step \d+ loss .*$", output, re.MULTILINE))
    return outputs


def check(python: Path, name: str, folder: Path, options: list[str]) -> None:
    first, again = printed_steps(python, name, folder, options)
    losses = [float(word) for word in re.findall(r"\d+\.\d+|nan|inf", " ".join(first))]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert first == again
    assert not list(folder.iterdir())


@pytest.mark.long
@pytest.mark.parametrize("name", BARE)
def test_same_seed_same_losses(name: str, tmp_path: Path) -> None:
    check(Path(sys.executable), name, tmp_path, BARE[name])


@pytest.mark.frameworks
@pytest.mark.parametrize("name", ["hf_encoder", "lightning_cnn"])
def test_same_seed_same_losses_with_frameworks(name: str, tmp_path: Path) -> None:
    if not FRAMEWORKS.exists():
        pytest.skip(f"{FRAMEWORKS} is not there: make frameworks installs it")
    check(FRAMEWORKS, name, tmp_path, ["--steps", "11"])
