"""Programs on which flatout once failed: under it they do what they do bare.

Each file in ``cases/`` is a program. Its comments that begin with ``# flatout run`` say how it is
run, one line a run: ``# flatout run --set KNOB=SETTING | ARGUMENTS`` (both may be empty). What it
prints, its exit status and the files that it leaves must be those of the bare program. The bare
program runs in a fork of a process that has imported torch, unless a line ``# bare in a process of
its own`` says that the program could tell. Runs with settings, and all runs of a program with a
line ``# long``, belong to ``make long``.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import forking
import pytest

CASES = Path(__file__).parent / "cases"
MARK = "# flatout run"
OWN_PROCESS = "# bare in a process of its own"
LONG = "# long"


class Outcome(NamedTuple):
    """What a program did: digests of the files it left by name."""

    status: int
    stdout: str
    stderr: str
    files: Mapping[str, str]


def outcome(flatout: tuple[str, ...], program: Path, arguments: tuple[str, ...]) -> Outcome:
    """Run a program in an empty folder of its own, with ``flatout`` in front of it."""
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as home:
        folder = Path(name)
        command = [*flatout, sys.executable, str(program), *arguments]
        environment = {**os.environ, "FLATOUT_HOME": home, "OMP_NUM_THREADS": "1"}
        if flatout or OWN_PROCESS in program.read_text():
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
        else:
            done = forking.run(command, cwd=folder, env=environment)
        files = {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    own = [line for line in done.stderr.splitlines() if not line.startswith("flatout:")]
    return Outcome(done.returncode, done.stdout, "\n".join(own), files)


bare = functools.cache(functools.partial(outcome, ()))


def runs() -> Iterator[Any]:
    """Each program with each of its runs."""
    for program in sorted(CASES.glob("*.py")):
        text = program.read_text()
        found = [line for line in text.splitlines() if line.startswith(MARK)]
        assert found, f"{program} does not say how it is run"
        for how in (line.removeprefix(MARK).strip() for line in found):
            is_long = LONG in text.splitlines() or "--set" in how
            marks = [pytest.mark.long] if is_long else []
            yield pytest.param(program, how, id=f"{program.stem} {how}".strip(), marks=marks)


@pytest.mark.parametrize(("program", "how"), list(runs()))
def test_under_flatout_it_does_what_it_does_bare(program: Path, how: str) -> None:
    options, _, arguments = how.partition("|")
    words = tuple(shlex.split(arguments))
    flatout = (sys.executable, "-m", "flatout", "run", *shlex.split(options), "--")
    assert outcome(flatout, program, words) == bare(program, words)
