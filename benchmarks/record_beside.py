"""Pairs of runs that take turns beside other work, recorded for ``replay.py``.

    python benchmarks/record_beside.py              # all programs, two to three minutes each
    python benchmarks/record_beside.py mlp gan

Of each program there are three pairs: bare against bare, bare against a setting that gains, and
bare against ``threads=one``. While the two runs of a pair take turns (``agent/relay.py``), this
script starts and stops other work: a process that competes for a CPU all the time, a test suite,
jobs of idle priority, and bursts. In between the machine is quiet, as it must be otherwise. Of each
block there are its beginning, its end, and the readings of CPU time. Written to
``beside/PROGRAM.json.gz``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from flatout import launch
from flatout.wire.lines import CpuUsage
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Relay, Request

HERE = Path(__file__).parent
ROOT = HERE.parent
BESIDE = HERE / "beside"

SCHEDULE = (
    *(("quiet", 16.0), ("steady", 4.0), ("quiet", 4.0), ("tests", 4.0), ("quiet", 4.0)),
    *(("idle", 4.0), ("quiet", 4.0), ("bursts", 16.0)),
)
"""The other work, and for how many seconds. Beside work that goes on all the time, a block that
takes 0.1 s by itself takes seconds."""

LONGEST_START_S = 60.0
"""The longest time for the start and the warm-up of both runs."""

BURST_S, PAUSE_S = (0.1, 0.8), (0.3, 1.5)
"""The shortest and the longest burst, and pause between two."""

TESTS = ("test_codec.py", "test_turns.py", "test_statistics.py", "test_proof.py")

COMPUTE = "while True: sum(range(1000))"
IDLE_COMPUTE = f"import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); {COMPUTE}"

FOREVER = ("--epochs", "100000")


class Program(NamedTuple):
    """A command, a setting that gains, and the steps of a block."""

    command: tuple[str, ...]
    gaining: dict[str, str]
    block_steps: int


EXAMPLES = ROOT / "examples"
PROGRAMS = {
    "vit": Program(
        (str(EXAMPLES / "image" / "train.py"), "--model", "vit", *FOREVER), {"precision": "bf16"}, 3
    ),
    "speech": Program((str(EXAMPLES / "speech" / "train.py"), *FOREVER), {"precision": "bf16"}, 3),
    "gan": Program(
        (str(HERE / "programs" / "dcgan.py"), "--width", "16", "--steps", "100000"),
        {"precision": "safe"},
        3,
    ),
    "mlp": Program(
        (str(HERE / "programs" / "mlp.py"), "--steps", "1000000"), {"optimizer": "onepass"}, 80
    ),
}


# Other work


@contextlib.contextmanager
def other_work(kind: str) -> Iterator[None]:
    """Run other work of a kind, until the end of the context."""
    with contextlib.ExitStack() as stack:
        if kind == "steady":
            stack.enter_context(process([sys.executable, "-c", COMPUTE]))
        elif kind == "tests":
            files = [str(ROOT / "tests" / name) for name in TESTS]
            suite = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
            loop = f"while true; do {' '.join(suite)}; done"
            stack.enter_context(process(["sh", "-c", loop]))
        elif kind == "idle":
            stack.enter_context(process([sys.executable, "-c", IDLE_COMPUTE]))
            stack.enter_context(process(["nice", "-n", "19", sys.executable, "-c", COMPUTE]))
        elif kind == "bursts":
            stack.enter_context(bursts())
        yield


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process in a group of its own, which is killed at the end of the context."""
    started = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield started
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@contextlib.contextmanager
def bursts() -> Iterator[None]:
    """Compute now and then, on one CPU."""
    over = threading.Event()

    def stop_and_go(computing: subprocess.Popen[bytes]) -> None:
        draw = random.Random(0)
        while not over.is_set():
            computing.send_signal(signal.SIGCONT)
            over.wait(draw.uniform(*BURST_S))
            computing.send_signal(signal.SIGSTOP)
            over.wait(draw.uniform(*PAUSE_S))

    with process([sys.executable, "-c", COMPUTE]) as computing:
        thread = threading.Thread(target=stop_and_go, args=(computing,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def follow_schedule(began: Callable[[], bool], log: list[tuple[str, float]]) -> None:
    """Run the other work of the schedule one after the other.

    Args:
        began: whether both runs have warmed up.
        log: gets the kinds of work, each with its beginning by ``time.perf_counter``.
    """
    deadline_s = time.perf_counter() + LONGEST_START_S
    while not began():
        if time.perf_counter() > deadline_s:
            return
        time.sleep(0.05)
    for kind, seconds in SCHEDULE:
        log.append((kind, time.perf_counter()))
        with other_work(kind):
            time.sleep(seconds)
    log.append(("end", time.perf_counter()))


# Recording


def record(name: str) -> dict[str, Any]:
    """Record the pairs of a program."""
    program = PROGRAMS[name]
    variants = {"same": {}, "gaining": program.gaining, "threads": {"threads": "one"}}
    return {
        kind: record_pair([sys.executable, *program.command], settings, program.block_steps)
        for kind, settings in variants.items()
    }


def record_pair(command: list[str], settings: dict[str, str], block_steps: int) -> dict[str, Any]:
    """Record a pair: the blocks and the readings of both runs, and when which other work ran."""
    relay = Relay(
        "",
        0,
        block_steps=block_steps,
        discard_steps=max(block_steps // 5, 1),
        warmup_steps=max(block_steps, 10),
        blocks=100000,
    )
    log: list[tuple[str, float]] = []
    folder: list[Path] = []

    def began() -> bool:
        return bool(folder) and (folder[0] / launch.RELAY_FOLDER / "done-1-1").exists()

    def follow() -> None:
        follow_schedule(began, log)
        for path in folder[0].glob("record-*.jsonl"):  # when one run ends, so does the other
            os.kill(int(path.stem.removeprefix("record-")), signal.SIGTERM)

    follower = threading.Thread(target=follow)
    follower.start()
    both = launch.start_relay(
        command,
        (Request(seed=0), Request(seed=0, settings=settings)),
        relay,
        timeout_seconds=2 * LONGEST_START_S + sum(seconds for _, seconds in SCHEDULE),
        progress=lambda run_directory: folder.append(run_directory) if not folder else None,
    )
    follower.join()
    processes = [finished.read_record().main for finished in both]
    bare, variant = processes
    assert bare is not None, both[0].output
    assert variant is not None, both[1].output
    for event in variant.events:
        assert event.what != "failed", event
    origin_s = bare.header.started_ns / 1e9
    return {
        "settings": settings,
        "work": [[kind, round(at_s - origin_s, 4)] for kind, at_s in log],
        "runs": [describe_run(one, one.header.started_ns / 1e9 - origin_s) for one in processes],
    }


def describe_run(process: ProcessRecord | None, shift_s: float) -> dict[str, Any]:
    """The blocks of a run, and its readings, on a common clock."""
    assert process is not None
    blocks = [list(block) for _, block in groupby(process.steady_steps, lambda step: step.block)]
    spans = [(block[0].at_s, block[-1].end_s) for block in blocks]
    names = [field.name for field in dataclasses.fields(CpuUsage)]
    return {
        "shift_s": round(shift_s, 5),
        "blocks_s": [[round(start_s, 5), round(end_s, 5)] for start_s, end_s in spans],
        "usage": {name: pack([getattr(one, name) for one in process.usage]) for name in names},
    }


def pack(values: list[Any]) -> Any:
    """Values in units of 10 us, as the first one and differences, which compress well."""
    if any(not isinstance(value, float) for value in values):
        return values if len(set(values)) > 1 else values[0]
    units = [round(value * 1e5) for value in values]
    return {"first": units[0], "steps": [b - a for a, b in pairwise(units)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    for name in parser.parse_args().programs or PROGRAMS:
        began_s = time.monotonic()
        data = json.dumps(record(name), separators=(",", ":")).encode()
        BESIDE.mkdir(exist_ok=True)
        (BESIDE / f"{name}.json.gz").write_bytes(gzip.compress(data, mtime=0))
        print(f"{name}: {time.monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main()
