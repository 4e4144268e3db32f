"""The heap of a watched program is the one that it has alone."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flatout import launch
from flatout.wire.request import Inspection, Request

KIB = 2**10

TOLERANCE_BYTES = 150 * KIB
"""The program's own blocks differ by some 10 KiB between two runs, because sets have other orders.
The agent's modules take 500 KiB, and leave another 700 KiB in holes."""

MEASURE = """
import ctypes, re, sys
import torch
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p

def main_heap():
    stream = ctypes.c_void_p(libc.fopen(b"heap.xml", b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    heap = re.search('<heap nr="0">(.*?)</heap>', open("heap.xml").read(), re.DOTALL)[1]
    size = int(re.search('<system type="current" size="([0-9]+)"', heap)[1])
    free = re.findall('<total type="(?:fast|rest)" count="[0-9]+" size="([0-9]+)"', heap)
    return size - sum(map(int, free)), sum(map(int, free))

print("in use and free:", *main_heap())
"""

TRAIN = """
net = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(500):
    optimizer.zero_grad(); net(torch.ones(2, 4)).sum().backward(); optimizer.step()
print("in use and free:", *main_heap())
"""

WATCHED = Request(seed=0, stop_steps=600, profile_steps=1, inspection=Inspection(state=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc_info is glibc's")
def test_the_agent_takes_no_memory_from_the_heap_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its blocks lie decides whether glibc returns memory at each step."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "program.py"
    script.write_text(MEASURE + TRAIN)
    command = [sys.executable, str(script)]
    alone = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    done = launch.start(command, WATCHED, output="capture")
    assert done.returncode == 0, done.output
    numbers = [
        [[int(word) for word in line.split()] for line in re.findall("free: (.*)", output)]
        for output in (alone, done.output or "")
    ]
    (imported, trained), (imported_watched, trained_watched) = numbers
    assert imported_watched == pytest.approx(imported, abs=TOLERANCE_BYTES)
    # Torch imports more in its first steps; some of this is what the agent has imported already.
    assert trained_watched[0] < trained[0] + TOLERANCE_BYTES


def test_a_module_of_the_program_that_has_the_name_of_one_of_pythons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent imports what is being imported already, in another thread: it must not wait."""
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    script = tmp_path / "program.py"
    script.write_text("import statistics\nprint('done', statistics.VALUE)\n")
    (tmp_path / "statistics.py").write_text("import torch\nVALUE = 7\n")
    done = launch.start(
        [sys.executable, str(script)], WATCHED, output="capture", timeout_seconds=90
    )
    assert not done.timed_out
    assert "done 7" in (done.output or "")
