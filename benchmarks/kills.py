"""Kills a rank of ``flatout run --ranks`` at a random moment, over and over: nothing may be left.

    python -m benchmarks.kills [--times 100] [--ranks 3] [--seed 0]

The program trains, and writes a checkpoint after every step. After each kill -9, all processes must
have ended within ten seconds, with a status that is not zero and one sentence that names the rank;
the checkpoint must load, and no process, view or shared memory may be left. A kill that comes after
the end of the program counts as none, and is tried again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from flatout.wire.request import RANK_VARIABLE, RUN_VARIABLE

PROGRAM = """
import os
import torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
optimizer = torch.optim.AdamW(net.parameters())
for step in range(40):
    loss = net(torch.randn(64, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    torch.save({"step": step, "net": net.state_dict()}, "checkpoint.new")
    os.replace("checkpoint.new", "checkpoint.pt")
"""

LONGEST_S = 10.0
"""Within which all ranks must have ended."""


def processes_of(home: Path, rank: int | None = None) -> list[int]:
    """The processes of all runs whose records are in a folder, or those of one rank."""
    found = []
    for name in os.listdir("/proc"):
        try:
            entries = Path(f"/proc/{name}/environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        is_of_run = any(e.startswith(f"{RUN_VARIABLE}={home}".encode()) for e in entries)
        if is_of_run and (rank is None or f"{RANK_VARIABLE}={rank}".encode() in entries):
            found.append(int(name))
    return found


def kill_once(ranks: int, rank: int, after_s: float, folder: Path) -> str | None:
    """Run the program and kill a rank; returns what is wrong, an empty text if nothing is, and
    ``None`` if the program had ended before."""
    home = folder / "home"
    (folder / "program.py").write_text(PROGRAM)
    shared = set(os.listdir("/dev/shm"))
    mounts = Path("/proc/mounts").read_text().count("flatout")
    command = [sys.executable, "-m", "flatout", "run", "--ranks", str(ranks), "--"]
    running = subprocess.Popen(
        [*command, sys.executable, "program.py"],
        cwd=folder,
        env={**os.environ, "FLATOUT_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(after_s)
    pids: list[int] = []
    while not pids and running.poll() is None:
        pids = processes_of(home, rank)
    if running.poll() is not None:
        return None
    killed_s = time.monotonic()
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
    try:
        _, stderr = running.communicate(timeout=3 * LONGEST_S)
    except subprocess.TimeoutExpired:
        running.kill()
        running.communicate()
        return "it has not ended"
    took_s = time.monotonic() - killed_s
    wrong = []
    if took_s > LONGEST_S:
        wrong.append(f"it has ended after {took_s:.1f} s")
    if running.returncode == 0:
        if "40 steps" in stderr:
            return None  # the program had ended, and only its process was left
        wrong.append("its status is 0")
    if f"rank {rank} has " not in stderr:
        wrong.append(f"no sentence names rank {rank}: {stderr[-300:]!r}")
    if "Traceback" in stderr:
        wrong.append("a traceback")
    time.sleep(0.2)
    if left := processes_of(home):
        wrong.append(f"processes {left} are left")
    if new := set(os.listdir("/dev/shm")) - shared:
        wrong.append(f"{sorted(new)} are left in /dev/shm")
    if Path("/proc/mounts").read_text().count("flatout") > mounts:
        wrong.append("a mount is left")
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        torch.load(checkpoint)
    return "; ".join(wrong)


def main() -> None:
    """Kill ranks, and print what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest-wait", type=float, default=6.0)
    arguments = parser.parse_args()
    chooses = random.Random(arguments.seed)
    done = too_late = failed = 0
    while done < arguments.times:
        rank = chooses.randrange(arguments.ranks)
        after_s = chooses.uniform(0.2, arguments.longest_wait)
        with tempfile.TemporaryDirectory() as folder:
            wrong = kill_once(arguments.ranks, rank, after_s, Path(folder))
        if wrong is None:
            too_late += 1
            continue
        done += 1
        if wrong:
            failed += 1
            print(f"rank {rank} after {after_s:.2f} s: {wrong}", flush=True)
    print(f"{done} kills, {failed} failed; {too_late} more came after the end")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
