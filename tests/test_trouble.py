"""A disk that is full or read-only and a record that is spoilt, through the verbs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, torch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3000):
    loss = model(torch.ones(3, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
ATTHEEND
print("done")
sys.exit(7)
"""

SPOILING = """
with open(f"{os.environ['FLATOUT_RUN']}/record-{os.getpid()}.jsonl", "w") as record:
    record.write("spoilt\\n")
"""

WATCHING_VERBS = {
    "doctor": ["doctor", "--in-place", "--steps", "5000"],
    "tune": ["tune", "--in-place", "--quiet", "--steps", "5000"],
}


def in_namespace(mounting: str, words: list[str], folder: Path) -> list[str]:
    """A command line that runs ``words`` where ``mounting``, a shell command, was done before."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"]).returncode != 0:
        pytest.skip("needs user namespaces, to mount a small disk")
    (folder / "home").mkdir()
    return [*unshare, "sh", "-c", f'cd "$0" && {mounting} && exec "$@"', str(folder), *words]


def flatout(
    verb: list[str], folder: Path, mounting: str = "", at_the_end: str = ""
) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM.replace("ATTHEEND", at_the_end))
    words = [sys.executable, "-m", "flatout", *verb, "--", sys.executable, "program.py"]
    places = {"FLATOUT_HOME": str(folder / "home"), "FLATOUT_CACHE": str(folder / "home/cache")}
    return subprocess.run(
        in_namespace(mounting, words, folder) if mounting else words,
        cwd=folder,
        env={**os.environ, **places, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def own_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The only line of flatout on stderr, the last one; no traceback of ours before it."""
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("flatout: "))
    assert done.stderr.endswith(f"{sentence}\n")
    assert "flatout/" not in done.stderr.replace(sentence, "")
    return sentence


FULL = {
    "nothing fits": "mount -t tmpfs -o size=4k tmpfs home && echo x > home/x",
    "the request fits": "mount -t tmpfs -o size=4k tmpfs home",
    "some steps fit": "mount -t tmpfs -o size=16k tmpfs home",
}


@pytest.mark.parametrize("disk", FULL)
def test_run_on_a_full_disk_is_the_program(disk: str, tmp_path: Path) -> None:
    done = flatout(["run"], tmp_path, FULL[disk])
    assert (done.returncode, done.stdout) == (7, "done\n")
    assert "No space left on device" in own_sentence(done)


@pytest.mark.long
@pytest.mark.parametrize("verb", WATCHING_VERBS)
@pytest.mark.parametrize("disk", FULL)
def test_doctor_and_tune_need_room_for_the_record(disk: str, verb: str, tmp_path: Path) -> None:
    done = flatout(WATCHING_VERBS[verb], tmp_path, FULL[disk])
    assert done.returncode == 2
    sentence = own_sentence(done)
    assert "cannot be written" in sentence
    assert "No space left on device" in sentence


READ_ONLY = "mount --bind home home && mount -o remount,ro,bind home"


def test_run_with_a_read_only_folder_is_the_program(tmp_path: Path) -> None:
    done = flatout(["run"], tmp_path, READ_ONLY)
    assert (done.returncode, done.stdout) == (7, "done\n")
    assert "nothing is recorded" in own_sentence(done)


@pytest.mark.parametrize("verb", WATCHING_VERBS)
def test_doctor_and_tune_need_a_folder_for_the_record(verb: str, tmp_path: Path) -> None:
    done = flatout(WATCHING_VERBS[verb], tmp_path, READ_ONLY)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Read-only file system" in own_sentence(done)


@pytest.mark.parametrize(
    "verb", [["tune", "--plan", "home/plan.toml"], ["doctor", "--json", "home/found.json"]]
)
def test_results_need_a_place_before_the_program_runs(verb: list[str], tmp_path: Path) -> None:
    done = flatout(verb, tmp_path, f"{READ_ONLY} && export FLATOUT_HOME=/tmp FLATOUT_CACHE=/tmp")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot be written: it is read-only here" in own_sentence(done)


def test_run_with_a_spoilt_record_is_the_program(tmp_path: Path) -> None:
    done = flatout(["run"], tmp_path, at_the_end=SPOILING)
    assert (done.returncode, done.stdout) == (7, "done\n")
    assert "the record cannot be read: " in own_sentence(done)


@pytest.mark.long
@pytest.mark.parametrize("verb", WATCHING_VERBS)
def test_doctor_and_tune_of_a_spoilt_record(verb: str, tmp_path: Path) -> None:
    done = flatout(WATCHING_VERBS[verb], tmp_path, at_the_end=SPOILING)
    assert done.returncode == 2
    sentence = own_sentence(done)
    assert "the record cannot be read: " in sentence
    assert "line 1 is not JSON" in sentence
