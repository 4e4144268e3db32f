"""Signals at random moments of ``flatout tune``: nothing is left over, nothing is lost.

    python benchmarks/soak.py                    # 30 kills, some 10 minutes
    python benchmarks/soak.py --kills 4 --seed 7

A small program is tuned, and at a random moment either flatout itself or the program's process is
killed, or flatout is told to end by SIGINT or SIGTERM, which it must do soon. Then no process of
the tune may be left, every journal must be readable and begin with what was in it before, and
``flatout tune --resume`` goes on, to be killed again. A tune that reaches its end before it is hit
must end with a plan, and another one begins. The last one is left alone.

Exits with 1 at the first failure; ``--seed`` repeats the moments, as far as the machine keeps pace,
and the folder that is named has the journals and what flatout said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from flatout import plan
from flatout.tune import journal

MARKER = "FLATOUT_SOAK"
"""A variable of the environment that all processes of the soak's tunes inherit."""

CLEAN_SECONDS = 15.0
"""By then all processes must be gone: the sentinel looks every half second, and a job that is told
to end has five seconds to do so."""

TUNE_SECONDS = 600.0
"""A tune that takes longer hangs."""

POLL_SECONDS = 0.05

TARGETS = [
    ("flatout", signal.SIGKILL),
    ("flatout", signal.SIGINT),
    ("flatout", signal.SIGTERM),
    ("the job", signal.SIGKILL),
]

OPTIONS = ["--budget", "20s", "--steps", "30", "--knobs", "optimizer,zero_grad"]

PROGRAM = '''
"""Many small tensors, so that the optimizer takes most of the step."""
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(0.1 * torch.randn(16)) for _ in range(400))

    def forward(self, x):
        return nn.functional.linear(x, torch.stack(list(self.parts)).sum(0)[None])

torch.set_num_threads(1)
net = Net()
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
for step in range(20_000):
    x = torch.randn(64, 16)
    y = (x[:, :1] > 0).float()
    loss = nn.functional.binary_cross_entropy_with_logits(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
'''


class FailedError(Exception):
    """Something is not as it should be after a kill, or at the end of a tune."""


def whole_lines(path: Path) -> bytes:
    """What the whole lines of a journal hold; a torn last line must not trouble its reader.

    Raises:
        FailedError: one of them is no JSON, or the reader does not see them.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        expected = [json.loads(line) for line in whole.splitlines()]
    except ValueError as error:
        raise FailedError(f"{path} is corrupt: {error}") from error
    if journal.read(path) != expected:
        raise FailedError(f"{path} is read as something else")
    return whole


def has_ended(path: Path) -> bool:
    """Whether the tune of a journal has come to its end."""
    return journal.read(path)[-1].get("kind") == "end"


class Soak:
    """One soak.

    Args:
        folder: for the program, the plans, flatout's own files and what it says.
        seed: of the moments.

    Attributes:
        checked: the journals that were read.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._random = random.Random(seed)
        self._home = folder / "home"
        self._marker = f"{os.getpid()}-{seed}"
        script = folder / "program.py"
        script.write_text(PROGRAM)
        self._job = [sys.executable, str(script)]
        self._tunes = 0
        self._starts = 0
        self.checked: set[Path] = set()
        self._journals: dict[Path, bytes] = {}
        self._ended: set[Path] = set()

    def run(self, kills: int) -> None:
        """Kill so many times, and then let a tune end.

        Raises:
            FailedError: something is wrong.
        """
        began_s = time.monotonic()
        self._finish(self._start())
        typical_s = time.monotonic() - began_s
        print(f"a tune that is left alone takes {typical_s:.0f} s", flush=True)
        done = 0
        while done < kills:
            target, number = self._random.choice(TARGETS)
            moment_s = self._random.uniform(0, typical_s)
            began_s, tunes = time.monotonic(), self._tunes
            tuning = self._start()
            if not self._kill(tuning, target, number, moment_s):
                self._finish(tuning)
                if self._tunes > tunes:  # not one that went on
                    typical_s = time.monotonic() - began_s
                continue
            done += 1
            if number != signal.SIGKILL:
                self._wait_for_end(tuning, number)
            self._wait(tuning)  # with its job killed, it may go on, or give up until it is resumed
            print(
                f"{done} of {kills}: {target}, {number.name} after {moment_s:.1f} s; tune "
                f"{self._tunes} "
                f"ended with {tuning.returncode}",
                flush=True,
            )
            has_ended = self._check()
            if has_ended or tuning.returncode == 0:
                self._check_plan()
        self._finish(self._start())

    def _start(self) -> subprocess.Popen[bytes]:
        """Go on with the tune that has not come to its end, or begin another one."""
        self._starts += 1
        # A tune that was killed before its journal had a line has nothing to go on with.
        resume = self._journals.keys() > self._ended
        if not resume:
            self._tunes += 1
        self._plan = self._folder / f"plan-{self._tunes}.toml"
        self._plan.unlink(missing_ok=True)
        self._said = self._folder / f"tune-{self._tunes}-{self._starts}.txt"
        options = [*OPTIONS, "--plan", str(self._plan), *["--resume"] * resume]
        with self._said.open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "flatout", "tune", *options, "--", *self._job],
                cwd=self._folder,
                env={
                    **os.environ,
                    "FLATOUT_HOME": str(self._home),
                    "OMP_NUM_THREADS": "1",
                    MARKER: self._marker,
                },
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
            )

    def _kill(
        self,
        tuning: subprocess.Popen[bytes],
        target: str,
        number: signal.Signals,
        moment_s: float,
    ) -> bool:
        """Send the target a signal at that moment, or the job when there is one; not if it ends
        before."""
        try:
            tuning.wait(moment_s)
        except subprocess.TimeoutExpired:
            pass
        else:
            return False
        if target == "flatout":
            tuning.send_signal(number)
            return True
        while tuning.poll() is None:
            for process in self._processes():
                try:
                    if process.cmdline() == self._job:
                        process.kill()
                        return True
                except psutil.NoSuchProcess:
                    continue
            time.sleep(POLL_SECONDS)
        return False

    def _wait_for_end(self, tuning: subprocess.Popen[bytes], number: signal.Signals) -> None:
        """Check that flatout ends soon after it was told to, and says so by its status.

        It may have been at its end, or, with its handlers not in place yet, at its very beginning.
        """
        try:
            status = tuning.wait(CLEAN_SECONDS)
        except subprocess.TimeoutExpired:
            raise FailedError(f"a tune goes on after {number.name}: {self._said}") from None
        if status not in (0, 128 + number, -number):
            raise FailedError(f"a tune ended with {status} after {number.name}: {self._said}")

    def _wait(self, tuning: subprocess.Popen[bytes]) -> None:
        try:
            tuning.wait(TUNE_SECONDS)
        except subprocess.TimeoutExpired:
            raise FailedError(f"a tune hangs: {self._said}") from None
        if "Traceback (most recent call last)" in self._said.read_text("utf-8", "replace"):
            raise FailedError(f"a traceback: {self._said}")

    def _finish(self, tuning: subprocess.Popen[bytes]) -> None:
        """Wait for a tune that nothing disturbs any more, and check that it ends with a plan."""
        self._wait(tuning)
        self._check()
        if tuning.returncode != 0:
            raise FailedError(f"a tune ended with {tuning.returncode}: {self._said}")
        self._check_plan()
        print(f"tune {self._tunes} ended with a plan", flush=True)

    def _check_plan(self) -> None:
        if not self._plan.exists():
            raise FailedError(f"a tune came to its end without a plan: {self._said}")
        if not plan.read(self._plan).proven:
            raise FailedError(f"the plan is not proven: {self._plan}")

    def _check(self) -> bool:
        """Check that no process is left, and that the journals hold what they held before.

        Returns whether a tune has come to its end since the last time.
        """
        deadline_s = time.monotonic() + CLEAN_SECONDS
        while left := self._processes():
            if time.monotonic() > deadline_s:
                raise FailedError(f"{len(left)} processes are left: {left}")
            time.sleep(POLL_SECONDS)
        paths = sorted(self._home.glob(f"tunes/*/{journal.JOURNAL_FILE}"))
        if len(paths) > self._tunes:
            raise FailedError(f"{self._tunes} tunes, but {len(paths)} journals: {self._home}")
        lost = self._journals.keys() - self._ended - set(paths)  # those that ended may be cleared
        if lost:
            raise FailedError(f"there is no {lost.pop()} any more")
        before, ended_before = self._journals, self._ended
        self._journals = {path: whole_lines(path) for path in paths}
        self._journals = {path: lines for path, lines in self._journals.items() if lines}
        self._ended = {path for path in self._journals if has_ended(path)}
        self.checked |= set(paths)
        for path, lines in self._journals.items():
            if not lines.startswith(before.get(path, b"")):
                raise FailedError(f"{path} has lost lines")
        return not self._ended <= ended_before

    def _processes(self) -> list[psutil.Process]:
        """What runs with our marker."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER) == self._marker:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie, or another user's
                continue
        return found

    def clean(self) -> None:
        """End what a failure left behind."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, help="of the moments (default: another every time)")
    arguments = parser.parse_args()
    seed = random.randrange(10_000) if arguments.seed is None else arguments.seed
    folder = Path(tempfile.mkdtemp(prefix="flatout-soak-"))
    print(f"seed {seed}, in {folder}", flush=True)
    soak = Soak(folder, seed)
    try:
        soak.run(arguments.kills)
    except FailedError as error:
        print(f"FAILED: {error}")
        return 1
    finally:
        soak.clean()
    if not soak.checked:
        print(f"FAILED: there is no journal in {folder}")
        return 1
    print(f"{arguments.kills} signals: no process left, {len(soak.checked)} journals sound")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
