"""The comparison of a command bare and under flatout sees what it must and masks what it may."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from compare import Outcome, compare, difference, differences

PYTHON = Path(sys.executable)

VARYING = """
import os, sys, time
own = "FLATOUT_RUN" in os.environ
print("pid", os.getpid(), "at", time.time(), "loss", 2.5)
open("log.json", "w").write('{"seconds": %s, "steps": 3}' % time.time())
"""

DIFFERENCES = {
    "stdout": 'if own: print("more")',
    "a word between two that vary": "print(time.time(), 1 + own, time.time())",
    "stderr": 'print("bare" if not own else "own", file=sys.stderr)',
    "exit code 3": "if own: sys.exit(3)",
    "tree": 'if own: os.mkdir("left behind")',
    "mode": 'open("tool", "w").close(); os.chmod("tool", 0o755 if own else 0o644)',
    "data.bin": 'open("data.bin", "wb").write(bytes([own]))',
    "log.json": 'open("log.json", "w").write(f"{time.time()} {own}")',
}


@pytest.fixture
def template(tmp_path: Path) -> Path:
    folder = tmp_path / "template"
    folder.mkdir()
    return folder


def test_what_varies_bare_may_vary(template: Path, tmp_path: Path) -> None:
    (template / "program.py").write_text(VARYING)
    own, _ = compare([sys.executable, "program.py"], template, tmp_path, PYTHON)
    assert own.returncode == 0
    assert own.stderr == ""


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_planted_difference_is_seen(what: str, template: Path, tmp_path: Path) -> None:
    (template / "program.py").write_text(VARYING + DIFFERENCES[what])
    names = {"a word between two that vary": "stdout: ", "mode": "tree: "}
    with pytest.raises(AssertionError, match=names.get(what, what)):
        compare([sys.executable, "program.py"], template, tmp_path, PYTHON)


def test_checkpoints_that_vary_bare_are_compared_by_value() -> None:
    def saved(at: int, weight: float) -> Outcome:
        file = io.BytesIO()
        torch.save({"at": at, "weights": [torch.ones(2), torch.tensor([2.0, weight])]}, file)
        return Outcome(0, "", "", "", {"model.pt": file.getvalue()})

    bare = [saved(1, 3), saved(2, 3)]
    assert not differences(bare, saved(3, 3), PYTHON)
    (found,) = differences(bare, saved(3, 3 + 2**-22), PYTHON)
    assert found.startswith("model.pt: '3.0000002")


@pytest.mark.parametrize(
    ("bare", "same", "other"),
    [
        (["loss 1.5 in 3 s", "loss 1.5 in 4 s"], "loss 1.5 in 5 s", "loss 1.6 in 5 s"),
        (["loss=1.5,s=3", "loss=1.5,s=4"], "loss=1.5,s=55", "loss=1.5,s=5\nmore"),
        (["a\nwait 1\nthe rest\n", "a\nthe rest\nwait 2\n"], "a\nthe rest\nhm\n", "a\nwait 1\n"),
        (["a b", "a b"], "a b", "a b c"),
        (["t=1 end", "t=2 end"], "t=3 end", "t=3 "),
    ],
)
def test_gaps(bare: list[str], same: str, other: str) -> None:
    assert difference(bare, same) is None
    assert difference(bare, other)
