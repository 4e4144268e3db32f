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
    "dcgan": ["--width", "8", "--batch-size", "8"],
    "jpeg": ["--files", "60"],
    "lstm_by_hand": [],
    "python_bound": [],
}


def printed_steps(python: Path, name: str, folder: Path, options: list[str]) -> list[list[str]]:
    """The lines with a step, of seed 1 twice and of seed 2, side by side on a thread each."""
    command = [str(python), str(PROGRAMS / f"{name}.py"), "--steps", "5", *options]
    started = [
        subprocess.Popen(
            [*command, "--seed", seed],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "1", "2")
    ]
    outputs = []
    for process in started:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        outputs.append(re.findall(r"^step \d+ loss .*$", output, re.MULTILINE))
    return outputs


def check(python: Path, name: str, folder: Path, options: list[str]) -> None:
    first, again, other = printed_steps(python, name, folder, options)
    losses = [float(word) for word in re.findall(r"\d+\.\d+|nan|inf", " ".join(first))]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)
    assert first == again
    assert first != other
    assert not list(folder.iterdir())


@pytest.mark.parametrize("name", BARE)
def test_same_seed_same_losses(name: str, tmp_path: Path) -> None:
    check(Path(sys.executable), name, tmp_path, BARE[name])


@pytest.mark.frameworks
@pytest.mark.parametrize("name", ["hf_encoder", "lightning_cnn"])
def test_same_seed_same_losses_with_frameworks(name: str, tmp_path: Path) -> None:
    if not FRAMEWORKS.exists():
        pytest.skip(f"{FRAMEWORKS} is not there: make frameworks installs it")
    check(FRAMEWORKS, name, tmp_path, [])
