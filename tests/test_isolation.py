"""What a job writes in the copy-on-write view is gone with it; what it reads is all there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flatout import cli
from flatout.cli.verbs import doctor, tune
from flatout.launch import isolation
from flatout.tune import prover, statistics

pytestmark = pytest.mark.skipif(
    isolation.unavailable_reason() is not None, reason=str(isolation.unavailable_reason())
)

WRITER = """
import os, shutil, sqlite3, sys, tempfile
from pathlib import Path
for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
    (folder / "new").write_text("new")
    with open(folder / "kept.txt", "a") as file:
        file.write("appended")
    os.rename(folder / "renamed.txt", folder / "other.txt")
    (folder / "deleted.txt").unlink()
    os.chmod(folder / "kept.txt", 0o600)
    os.symlink("kept.txt", folder / "link")
    shutil.move(folder / "folder", folder / "moved")
    (folder / "moved" / "inner.txt").write_text("changed")
    database = sqlite3.connect(folder / "base.sqlite")
    database.execute("create table t (x)"); database.commit(); database.close()
    assert sorted(p.name for p in folder.iterdir() if p.name in NAMES) == sorted(NAMES)
    assert (folder / "kept.txt").read_text() == "oldappended"
print(os.getcwd(), sys.argv[1:], os.environ.get("MARK"), sys.stdin.read())
sys.exit(7)
"""
NAMES = ["new", "kept.txt", "other.txt", "link", "moved", "base.sqlite"]


TRAINER = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        parts = (torch.nn.Parameter(0.1 * torch.randn(16)) for _ in range(100))
        self.parts = torch.nn.ParameterList(parts)
    def forward(self, x):
        return x @ torch.stack(list(self.parts)).sum(0)
net = Net()
optimizer = torch.optim.AdamW(net.parameters())
for step in range(1000):
    loss = net(torch.randn(8, 16)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for folder in (Path.cwd(), Path.home(), Path(tempfile.gettempdir())):
        with open(folder / "kept.txt", "a") as file:
            print(loss.item(), file=file)
    if step % 10 == 0:
        torch.save(net.state_dict(), "other.txt")
"""


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    entries = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content = (
            hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        )
        entries[str(path)] = (status.st_mode, status.st_mtime_ns, status.st_size, content)
    return entries


@pytest.fixture
def world(tmp_path: Path) -> Path:
    for name in ("work", "home", "temporary"):
        folder = tmp_path / name
        (folder / "folder").mkdir(parents=True)
        for file in ("kept.txt", "renamed.txt", "deleted.txt", "folder/inner.txt"):
            (folder / file).write_text("old")
    (tmp_path / "work" / "program.py").write_text(f"NAMES = {NAMES!r}\n{WRITER}")
    return tmp_path


def run(world: Path, job: list[str], python: str = sys.executable) -> subprocess.CompletedProcess:  # type: ignore[type-arg]
    stage = isolation.command(job, passthrough=[], scratch=world / "scratch")
    stage[0] = python
    return subprocess.run(
        stage,
        cwd=world / "work",
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(world / "home"),
            "TMPDIR": str(world / "temporary"),
            "MARK": "kept",
        },
        input="typed",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_write_is_seen_inside_and_gone_outside(world: Path) -> None:
    before = {name: snapshot(world / name) for name in ("work", "home", "temporary")}
    result = run(world, [sys.executable, "program.py", "a b"])
    assert result.stderr == ""
    assert result.stdout.split() == [str(world / "work"), "['a", "b']", "kept", "typed"]
    assert result.returncode == 7
    for name, entries in before.items():
        assert snapshot(world / name) == entries


@pytest.mark.parametrize("verb", ["doctor", pytest.param("tune", marks=pytest.mark.long)])
def test_a_verb_leaves_every_file_as_it_was(
    verb: str, world: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For tune, with a first run, a comparison inside one process, and pairs of fresh ones."""
    program = WRITER.rpartition("print(os.getcwd()")[0] + TRAINER
    (world / "work" / "program.py").write_text(f"NAMES = {NAMES!r}\n{program}")
    monkeypatch.chdir(world / "work")
    monkeypatch.setenv("HOME", str(world / "home"))
    monkeypatch.setenv("TMPDIR", str(world / "temporary"))
    monkeypatch.setenv("FLATOUT_HOME", str(world / "own"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(tune, "ceilings", lambda python: None)
    monkeypatch.setattr(doctor, "_ceilings", lambda python: None)
    monkeypatch.setattr(statistics, "MINIMUM_PAIRS", 2)
    monkeypatch.setattr(prover, "MAXIMUM_PAIRS", 2)
    # What is measured beside other tests counts: only the files matter here.
    monkeypatch.setattr("flatout.tune.quiet.HARDLY_TAKEN", 1.0)
    monkeypatch.setattr("flatout.tune.neighbours.WAIT_SHARE", 0.0)
    found = world / "found.json"
    options = {
        "doctor": ["--steps", "20"],
        "tune": ["--steps", "30", "--knobs", "optimizer", "--plan", str(world / "plan.toml")],
    }
    options["tune"] += ["--budget", "500s"]
    before = {name: snapshot(world / name) for name in ("work", "home", "temporary")}
    job = [sys.executable, "program.py"]
    assert cli.main([verb, *options[verb], "--json", str(found), "--", *job]) == 0
    for name, entries in before.items():
        assert snapshot(world / name) == entries
    document = json.loads(found.read_text())
    if verb == "doctor":
        assert document["steps"] > 10
    else:
        assert any(arm["ratio"] for arm in document["arms"])
    assert "flatout/" not in capfd.readouterr().err


def test_without_privileges() -> None:
    setpriv = shutil.which("setpriv")
    python = "/usr/bin/python3"
    if os.geteuid() != 0 or setpriv is None or not os.path.exists(python):
        pytest.skip("needs root, setpriv and the system's Python to give up privileges")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        source = Path(isolation.__file__).read_text()
        script = Path(folder, "isolation.py")
        script.write_text(source)
        target = Path(folder, "target")
        target.write_text("old")
        Path(folder, "inner").mkdir()
        os.chown(folder, 65534, 65534)
        os.chown(target, 65534, 65534)
        stage = isolation.command(
            [
                "sh",
                "-c",
                f"echo new > {target}; cat {target}; id -u; echo x > {folder}/made && "
                f"echo x > /var/tmp/made && mv {folder}/inner {folder}/moved && ls {folder}/moved",
            ],
            passthrough=[],
            scratch=Path(folder, "scratch"),
        )
        stage[0], stage[3] = python, str(script)
        result = subprocess.run(
            [setpriv, "--reuid=65534", "--regid=65534", "--clear-groups", *stage],
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout.split() == ["new", "65534"], result.stderr
        assert target.read_text() == "old"
        assert not Path(folder, "made").exists()


def test_folders_passed_through_are_real(world: Path) -> None:
    stage = isolation.command(
        ["sh", "-c", "echo real > ../home/real"],
        passthrough=[world / "home"],
        scratch=world / "scratch",
    )
    subprocess.run(stage, cwd=world / "work", check=True)
    assert (world / "home" / "real").read_text() == "real\n"


def test_compile_caches_persist_between_trials_but_not_outside(world: Path) -> None:
    inside = (
        "import getpass, os, tempfile; folder = os.path.join(tempfile.gettempdir(), "
        "'torchinductor_' + getpass.getuser()); print(sorted(os.listdir(folder))); "
        "open(os.path.join(folder, 'kernel'), 'w')"
    )
    outputs = [run(world, [sys.executable, "-c", inside]).stdout.strip() for _ in range(2)]
    assert outputs == ["[]", "['kernel']"]
    assert not list((world / "temporary").glob("torchinductor*"))


@pytest.mark.parametrize(
    ("job", "status", "says"),
    [(["no-such-program"], 127, "there is no program"), (["/etc"], 126, "cannot be executed")],
)
def test_programs_that_are_none(world: Path, job: list[str], status: int, says: str) -> None:
    result = run(world, job)
    assert result.returncode == status
    assert says in result.stderr
    assert "Traceback" not in result.stderr
