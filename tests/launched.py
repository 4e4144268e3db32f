"""A program that ranks of a launcher run, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, torch
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FLATOUT_NODE")
print("sees", [name for name in names if name in os.environ], os.environ.get("OMP_NUM_THREADS"))
os.mkdir("made")
torch.set_default_dtype(torch.float64)
torch.manual_seed(1)
net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(int(sys.argv[1])):
    loss = net(torch.randn(8, 16)).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    print(loss.item(), flush=True)
print("hash", hash("word"), file=sys.stderr)
sys.exit(int(sys.argv[2]))
"""

STEPS = 4


@dataclass(frozen=True)
class Ended:
    """How a process has ended.

    Attributes:
        status: its exit status or negative signal.
        stdout, stderr: what it has printed.
    """

    status: int
    stdout: str
    stderr: str

    def check_is(self, alone: Ended, ranks: int) -> None:
        """Check that this is rank 0, and has ended as the program alone."""
        assert self.status == alone.status, self
        words, expected = self.stdout.split(), alone.stdout.split()
        first = expected[:3]
        assert words[:3] == first == ["sees", "[]", "None"]
        assert [float(word) for word in words[3:]] == pytest.approx(
            [float(word) for word in expected[3:]], rel=1e-12
        )
        assert len(words) == 3 + STEPS
        assert f"{STEPS} calls of Sequential were shared out" in self.stderr
        assert f"; {ranks} ranks are at most" in self.stderr
        assert "has died" not in self.stderr

    def check_is_another(self, status: int, rank: int, ranks: int) -> None:
        """Check that this is the flatout of another rank."""
        assert (self.status, self.stdout) == (status, ""), self
        assert f"flatout: rank {rank} of {ranks}; the program is rank 0, on " in self.stderr
        assert "has died" not in self.stderr


def wait(process: subprocess.Popen[str], timeout_s: float = 120) -> Ended:
    """Wait for the end of a process."""
    out, err = process.communicate(timeout=timeout_s)
    return Ended(process.returncode, out, err)


def run_alone(folder: Path, status: int = 0) -> Ended:
    """Run the program as one process in a folder of its own, which is made."""
    here = folder / "alone"
    here.mkdir()
    words = program(folder, STEPS, status)
    done = subprocess.run(words, cwd=here, capture_output=True, text=True, check=False)
    return Ended(done.returncode, done.stdout, done.stderr)


def program(folder: Path, steps: int = STEPS, status: int = 0) -> list[str]:
    """The command line of the program."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    return [sys.executable, str(script), str(steps), str(status)]


def flatout(*words: str) -> list[str]:
    """A command line of ``flatout run``."""
    return [sys.executable, "-m", "flatout", "run", *words]


def place(rank: int, size: int, address: str, port: int) -> dict[str, str]:
    """What torchrun and its like tell a rank."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def output_of_rank(home: Path, rank: int) -> str:
    """What a rank has printed."""
    [file] = home.glob(f"runs/*/rank-{rank}.txt")
    return file.read_text()


def environment(**variables: str) -> dict[str, str]:
    """The environment of this process without numbers of threads, and with other variables."""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {**kept, **variables}
