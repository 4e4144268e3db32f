"""A copy of flatout with more knobs, as a new file under ``knobs/`` would bring them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import flatout

KNOB = """
from flatout.knob import Card, Facts, Knob, Match

def match(facts):
    return Match(("on",))

def apply(host, setting):
    import torch
    torch.planted = getattr(torch, "planted", frozenset()) | {{"{name}"}}
{apply}
    def undo():
        torch.planted -= {{"{name}"}}
{undo}
    return undo

KNOB = Knob(
    name="{name}", summary="planted", settings=("on",), exactness={{"on": "{exactness}"}}, hot=True,
    platforms=("cpu",), card=Card("planted", "always", "never", "not at all", ("a test",)),
    match=match, apply=apply,
)
"""
"""What it does to the program is between ``apply`` and ``undo``; the program may look at
``torch.planted`` to see which of them are on."""


def knob(name: str, apply: str = "pass", undo: str = "pass", exactness: str = "reordered") -> str:
    """The source of a knob.

    Args:
        name: of the knob.
        apply, undo: statements, where ``host`` and ``torch`` are known.
        exactness: of its one setting, ``on``.
    """
    return KNOB.format(
        name=name,
        apply=_indented(apply, 4),
        undo=_indented(undo, 8),
        exactness=exactness,
    )


def _indented(source: str, columns: int) -> str:
    return "\n".join(" " * columns + line for line in source.strip().splitlines())


def plant(folder: Path, knobs: Mapping[str, str]) -> Path:
    """Copy flatout into a folder with these knobs, by name; returns what goes on PYTHONPATH."""
    site = folder / "site"
    shutil.copytree(
        Path(flatout.__file__).parent,
        site / "flatout",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for name, source in knobs.items():
        (site / "flatout" / "knobs" / f"{name}.py").write_text(source)
    return site


def run(
    site: Path, *words: str, folder: Path, before: str = "", timeout: float = 400
) -> subprocess.CompletedProcess[str]:
    """Run that flatout's command line.

    Args:
        site: see ``plant``.
        words: of the command line.
        folder: where.
        before: statements that are executed before.
        timeout: in seconds.
    """
    start = f"import sys\n{before}\nfrom flatout.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", start, *words],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(site),
            "FLATOUT_HOME": str(folder / "flatout-home"),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
