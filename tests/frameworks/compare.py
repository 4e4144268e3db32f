"""Runs a command bare and under ``flatout run``, and compares what came of it.

What may differ is only what differs between bare runs: they are laid over each other, and where
their words differ stands a gap, such as for a time or a process id.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from flatout.wire.record import RunRecord, read_run

TIMEOUT_SECONDS = 280

MOST_BARE_RUNS = 4
"""A time can read the same in two bare runs by chance; a difference counts when more bare runs,
up to this many, do not differ there either."""

LOADED = """
import json, sys, torch
def show(value, at):
    if isinstance(value, torch.Tensor):
        return f"{at} {value.dtype} {tuple(value.shape)} {value.flatten().tolist()}\\n"
    if isinstance(value, dict):
        return "".join(show(item, f"{at}[{key!r}]") for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return "".join(show(item, f"{at}[{number}]") for number, item in enumerate(value))
    if hasattr(value, "__dict__"):
        return f"{at} {type(value)}\\n" + show(vars(value), at)
    return f"{at} {value!r}\\n"
print(json.dumps([show(torch.load(path, weights_only=False), "") for path in sys.argv[1:]]))
"""
CHECKPOINTS = (".bin", ".ckpt", ".pt", ".pth")

WITHIN_LINE, ANY = "\0line", "\0any"
"""Words of a pattern that stand for what differs between bare runs: in a line, or lines."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind.

    Attributes:
        tree: mode and path of everything in the folder, links with their targets.
        files: path -> content.
    """

    returncode: int
    stdout: str
    stderr: str
    tree: str
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
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        "TQDM_DISABLE": "1",  # how often a progress bar is redrawn depends on the time
        # Whether Python marks a constant in a .pyc as shared depends on what else lives by then.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    job = command
    if flatout_home is not None:
        environment["FLATOUT_HOME"] = str(flatout_home)
        job = [sys.executable, "-m", "flatout", "run", "--", *command]
    done = subprocess.run(
        job,
        cwd=folder,
        env=environment,
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    stdout, stderr = done.stdout.decode(), done.stderr.decode()  # with their \r, if any
    paths = sorted(folder.rglob("*"))
    files = [path for path in paths if path.is_file() and not path.is_symlink()]
    return Outcome(
        done.returncode,
        stdout,
        stderr if flatout_home is None else without_own_lines(stderr),
        "".join(_entry(path, folder) for path in paths),
        {str(path.relative_to(folder)): path.read_bytes() for path in files},
    )


def _entry(path: Path, folder: Path) -> str:
    target = f" -> {os.readlink(path)}" if path.is_symlink() else ""
    return f"{path.lstat().st_mode:o} {path.relative_to(folder)}{target}\n"


def _texts(contents: Sequence[bytes], name: str, python: Path) -> list[str]:
    """Files as text: of a checkpoint its values with their places, as loaded by ``python``."""
    if Path(name).suffix not in CHECKPOINTS:
        return [content.decode(errors="backslashreplace") for content in contents]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(number)) for number in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        loading = subprocess.run(
            [str(python), "-c", LOADED, *map(str, paths)], capture_output=True, text=True
        )
    assert loading.returncode == 0, loading.stderr
    texts: list[str] = json.loads(loading.stdout)
    return texts


def without_own_lines(stderr: str) -> str:
    """Standard error without flatout's own lines."""
    return re.sub(r"^flatout: .*\n", "", stderr, flags=re.MULTILINE)


def words(text: str) -> list[str]:
    """The words of a text and what is between them; a number is one word."""
    return re.findall(r"[\w.+-]+|\n|[^\S\n]+|[^\w\s]", text)


def pattern(bare: Sequence[str]) -> list[str]:
    """The words that all bare texts have in common, with gaps between them."""
    common = words(bare[0])
    for text in bare[1:]:
        other = words(text)
        merged: list[str] = []
        matcher = SequenceMatcher(None, common, other, autojunk=False)
        for tag, start, end, other_start, other_end in matcher.get_opcodes():
            if tag == "equal":
                merged += common[start:end]
            else:
                differing = [*common[start:end], *other[other_start:other_end]]
                lines = ANY in differing or "\n" in differing
                merged.append(ANY if lines else WITHIN_LINE)
        common = merged
    return common


def difference(bare: Sequence[str], own: str) -> str | None:
    """Where ``own`` leaves what all bare texts have in common; ``None``: nowhere."""
    common = pattern(bare)
    gaps = (WITHIN_LINE, ANY)
    reached = _past_gaps({0}, common)  # places in ``common`` that explain the words so far
    seen = ""
    for word in words(own):
        onward = {at + 1 for at in reached if at < len(common) and common[at] == word}
        onward |= {
            at
            for at in reached
            if at < len(common) and common[at] in gaps and (word != "\n" or common[at] == ANY)
        }
        if not onward:
            expected = {common[at] for at in reached if at < len(common)} - {*gaps}
            line = seen.rpartition("\n")[2]
            return f"{word!r} instead of {sorted(expected)} after {line!r}"
        reached = _past_gaps(onward, common)
        seen += word
    return None if len(common) in reached else f"it ends early, after {seen[-80:]!r}"


def _past_gaps(reached: set[int], common: list[str]) -> set[int]:
    """A gap may also be empty."""
    reached = set(reached)
    for at in sorted(reached):
        while at < len(common) and common[at] in (WITHIN_LINE, ANY):
            at += 1
            reached.add(at)
    return reached


def differences(bare: Sequence[Outcome], own: Outcome, python: Path) -> list[str]:
    """In what ``own`` differs although no two of the bare outcomes differ in it.

    ``python`` is the interpreter whose torch loads the program's checkpoints.
    """
    found = []
    if own.returncode not in {outcome.returncode for outcome in bare}:
        found.append(f"exit code {own.returncode}, bare {bare[0].returncode}")
    for name in ("stdout", "stderr", "tree"):
        where = difference([getattr(outcome, name) for outcome in bare], getattr(own, name))
        if where:
            found.append(f"{name}: {where}")
    for name in bare[0].files:
        if name not in own.files or not all(name in outcome.files for outcome in bare):
            continue  # what is there at all is compared with the tree
        contents = [outcome.files[name] for outcome in bare]
        if own.files[name] in contents:
            continue
        if len(set(contents)) == 1:
            found.append(f"{name}: its bytes differ, which they do not bare")
            continue
        texts = _texts([*contents, own.files[name]], name, python)
        where = difference(texts[:-1], texts[-1])
        if where:
            found.append(f"{name}: {where}")
    return found


def compare(
    command: list[str], template: Path, work: Path, python: Path, bare_runs: int = 2
) -> tuple[Outcome, RunRecord]:
    """Assert that a command does the same bare and under ``flatout run``.

    ``python`` is the interpreter whose torch loads the program's checkpoints; ``bare_runs`` may be
    1 for a program that does the same every time. Returns the outcome under flatout, and its
    record.
    """
    folder, home = work / "job", work / "flatout"
    bare = [run(command, template, folder, None) for _ in range(bare_runs)]
    own = run(command, template, folder, home)
    while (found := differences(bare, own, python)) and len(bare) < MOST_BARE_RUNS:
        bare.append(run(command, template, folder, None))
    assert not found, "\n".join(found)
    (run_directory,) = (home / "runs").iterdir()
    return own, read_run(run_directory)
