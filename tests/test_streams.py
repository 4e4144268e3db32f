"""What flatout says never decides how a program ends, wherever its lines go."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

FLATOUT = f"{shlex.quote(sys.executable)} -m flatout"

BROKEN = {
    "full": "2>/dev/full",
    "closed": "2>&-",
    "all closed": "<&- >&- 2>&-",
    "read by nobody": "2>&0",
}
"""What a shell makes of stderr; descriptor 0 is a pipe whose reader has ended."""


def status(line: str, folder: Path) -> tuple[int, str]:
    """Exit status of a line of shell, and what went to stdout."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            ["sh", "-c", line],
            env={**os.environ, "FLATOUT_HOME": str(folder)},
            stdin=writer,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stdout


@pytest.mark.parametrize("broken", BROKEN)
def test_the_status_is_the_programs(broken: str, tmp_path: Path) -> None:
    for code in (0, 7):
        line = f"{FLATOUT} run -- sh -c 'exit {code}' {BROKEN[broken]}"
        assert status(line, tmp_path) == (code, "")


@pytest.mark.parametrize("broken", BROKEN)
def test_a_mistake_keeps_its_status(broken: str, tmp_path: Path) -> None:
    for words, code in (("run -- no-such-program", 127), ("no-such-verb", 2)):
        assert status(f"{FLATOUT} {words} {BROKEN[broken]}", tmp_path) == (code, "")


def test_what_was_asked_for_and_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    assert status(f"{FLATOUT} --help >/dev/full", tmp_path)[0] == 1
    assert status(f"{FLATOUT} knobs >&0", tmp_path)[0] == 141
    assert status(f"{FLATOUT} knobs >&-", tmp_path)[0] == 0
    line = f"{FLATOUT} knobs 2>&1 >/dev/full"
    said = "flatout: standard output cannot be written: No space left on device\n"
    assert status(line, tmp_path) == (1, said)


AGENT = """
import torch
print(torch.ones(2).sum().item())
"""


@pytest.mark.parametrize("broken", ["full", "all closed"])
@pytest.mark.parametrize("fault", ["cannot start", "cannot be loaded"])
def test_an_agent_that_fails_leaves_the_program_its_status(
    fault: str, broken: str, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(AGENT)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "request.json").write_text("no request")
    if fault == "cannot be loaded":
        (tmp_path / "program.py").write_text(
            "import sys, types; sys.modules['flatout'] = types.ModuleType('flatout')\n" + AGENT
        )
    import flatout.launch

    hook = Path(flatout.launch.__file__).parent / "hook"
    variables = f"PYTHONPATH={shlex.quote(str(hook))} FLATOUT_RUN={shlex.quote(str(tmp_path))}/run"
    program = shlex.quote(str(tmp_path / "program.py"))
    line = f"{variables} {shlex.quote(sys.executable)} {program} {BROKEN[broken]}"
    out = "" if broken == "all closed" else "2.0\n"
    assert status(line, tmp_path) == (0, out)
