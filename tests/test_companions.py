"""A run with several ranks prints, writes and ends as the program does alone, and leaves nothing."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flatout import cli
from flatout.cli.verbs import run as run_verb
from flatout.launch import companions, isolation
from flatout.machine import cores
from flatout.wire.record import read_run
from flatout.wire.request import RANK_VARIABLE, RUN_VARIABLE, Request

RUNS_RANKS = pytest.mark.skipif(
    isolation.unavailable_reason() is not None, reason=str(isolation.unavailable_reason())
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for records; the working folder is another."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


def flatout(program: str, ranks: int = 2, *arguments: str) -> list[str]:
    """A command line that runs a program, with arguments of its own."""
    Path("program.py").write_text(program)
    own = ["run", "--ranks", str(ranks), "--"]
    return [sys.executable, "-m", "flatout", *own, sys.executable, "program.py", *arguments]


def ended(
    program: str, ranks: int = 2, *arguments: str, **options: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        flatout(program, ranks, *arguments),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def run_directory(home: Path) -> Path:
    [directory] = (home / "runs").iterdir()
    return directory


def output(home: Path, rank: int = 1) -> str:
    return companions.output_file(run_directory(home), rank).read_text()


def left(home: Path) -> list[int]:
    """The processes of the runs in a folder that still exist."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
                of_run = f"{RUN_VARIABLE}={home}/".encode()
                if any(entry.startswith(of_run) for entry in environment):
                    found.append(int(name))
    return found


def wait_until_gone(home: Path, timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while left(home):
        assert time.monotonic() < deadline_s, left(home)
        time.sleep(0.02)


PROGRAM = """
import os, random, sys
os.mkdir("made")
print("numbers", random.random(), hash("word"), sys.argv[1:])
print("stdin", sys.stdin.read())
with open("log.txt", "a") as file:
    file.write("a line\\n")
print("read back", open("log.txt").read())
print("to stderr", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@RUNS_RANKS
@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rank_0_is_the_program(status: int, ranks: int, home: Path) -> None:
    Path("data.txt").write_text("typed")
    with open("data.txt") as data:
        done = ended(PROGRAM, ranks, str(status), stdin=data)
    assert done.returncode == status
    assert done.stdout.splitlines()[1:] == ["stdin typed", "read back a line", ""]
    assert done.stderr.splitlines()[0] == "to stderr"
    assert all(line.startswith("flatout: ") for line in done.stderr.splitlines()[1:])
    assert "rank" not in done.stderr.replace(str(home), "")
    assert Path("log.txt").read_text() == "a line\n"
    assert sorted(os.listdir()) == ["data.txt", "log.txt", "made", "program.py"]
    for rank in range(1, ranks):
        assert sorted(output(home, rank).splitlines()) == sorted(
            [*done.stdout.splitlines(), "to stderr"]
        )
    assert not left(home)
