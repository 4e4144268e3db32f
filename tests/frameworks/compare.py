"""Runs a command bare, bare again and under ``flatout run``, and compares what came of it.

What may differ is only what differs between the two bare runs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from flatout.record import RunRecord, read_run

TIMEOUT_SECONDS = 280


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str
    files: dict[str, bytes]


def run(command: list[str], template: Path, folder: Path, flatout_home: Path | None) -> Outcome:
    """Run a command in a fresh copy of ``template``; ``flatout_home``: under ``flatout run``.

    The copy always lies at the same path, since programs print and save paths.
    """
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(template, folder)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",  # bars redraw themselves as time goes by
    }
    if flatout_home is not None:
        environment["FLATOUT_HOME"] = str(flatout_home)
        command = [sys.executable, "-m", "flatout", "run", "--", *command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and "__pycache__" not in path.parts
    }
    return Outcome(done.returncode, done.stdout, done.stderr, files)


def without_own_lines(stderr: str) -> str:
    """Standard error without flatout's own lines."""
    return "".join(
        line for line in stderr.splitlines(keepends=True) if not line.startswith("flatout: ")
    )


def differences(first: str, second: str, third: str) -> list[str]:
    """Where ``third`` differs from ``first`` in words in which ``second`` does not."""
    words = [re.split(r"(\s+)", text) for text in (first, second, third)]
    if not len(words[0]) == len(words[1]) == len(words[2]):
        same = words[0] == words[2] or len(words[0]) != len(words[1])
        return [] if same else [f"{len(words[0])} words bare, {len(words[2])} under flatout"]
    return [
        f"{bare!r} bare, {own!r} under flatout"
        for bare, again, own in zip(*words, strict=True)
        if bare == again != own
    ]


def compare(command: list[str], template: Path, work: Path) -> tuple[Outcome, RunRecord]:
    """Assert that a command does the same bare and under ``flatout run``.

    Returns the outcome under flatout, and its record.
    """
    folder, home = work / "job", work / "flatout"
    bare = run(command, template, folder, None)
    again = run(command, template, folder, None)
    own = run(command, template, folder, home)
    assert bare.returncode == own.returncode, own.stderr
    assert not differences(bare.stdout, again.stdout, own.stdout)
    stderr = [without_own_lines(outcome.stderr) for outcome in (bare, again, own)]
    assert not differences(stderr[0], stderr[1], stderr[2])
    assert own.files.keys() == bare.files.keys() or bare.files.keys() != again.files.keys()
    for name, content in bare.files.items():
        if content == again.files.get(name):
            assert own.files[name] == content, f"{name} differs"
    (run_directory,) = (home / "runs").iterdir()
    return own, read_run(run_directory)
