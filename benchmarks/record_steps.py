"""Step times of real programs, recorded for ``replay.py``.

    python benchmarks/record_steps.py                # all programs, about two minutes each
    python benchmarks/record_steps.py mlp gan

Of each program: one long run; many short ones, each in a process of its own, one after the other
with the same seed; many pairs of them that take turns (``agent/relay.py``); and one comparison
inside a process, in which a real knob is turned on and off, which shows what a switch leaves
behind. Written to ``steps/PROGRAM.json.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

from flatout import launch
from flatout.record import Step
from flatout.request import Comparison, Relay, Request
from flatout.tune import trial

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
STEPS = HERE / "steps"

LONG_SECONDS, LONG_STEPS = 40.0, 4000
SHORT_RUNS, SHORT_STEPS = 12, 24
RELAYS = 16
RELAY = Relay("", 0, block_steps=5, discard_steps=1, warmup_steps=3, blocks=5)
SWITCHED_ROUNDS, SWITCHED_BLOCK_STEPS = 16, 12
FOREVER = ("--epochs", "100000")


class Program(NamedTuple):
    """A command, and a knob that does something to it."""

    command: tuple[str, ...]
    settings: dict[str, str]


PROGRAMS = {
    "cnn": Program((str(EXAMPLES / "image" / "train.py"), *FOREVER), {"precision": "bf16"}),
    "vit": Program(
        (str(EXAMPLES / "image" / "train.py"), "--model", "vit", *FOREVER), {"precision": "bf16"}
    ),
    "language": Program(
        (str(EXAMPLES / "language" / "train.py"), "--batch-size", "2", "--steps", "100000"),
        {"precision": "bf16"},
    ),
    "speech": Program((str(EXAMPLES / "speech" / "train.py"), *FOREVER), {"precision": "bf16"}),
    "gan": Program(
        (str(HERE / "programs" / "dcgan.py"), "--width", "16", "--steps", "100000"),
        {"precision": "safe"},
    ),
    "mlp": Program(
        (str(HERE / "programs" / "mlp.py"), "--steps", "100000"), {"optimizer": "onepass"}
    ),
    "bucketed": Program(
        (str(HERE / "programs" / "bucketed.py"), "--steps", "100000"), {"precision": "bf16"}
    ),
}


def record(name: str, program: Program) -> None:
    """Record one program."""
    command = [sys.executable, *program.command]

    def steps_of(request: Request) -> list[Step]:
        return trial.run(command, request, isolate=False, timeout_seconds=600).process.steps

    started_s = time.monotonic()
    long = steps_of(Request(stop_steps=LONG_STEPS, stop_seconds=LONG_SECONDS, seed=0))
    short = [steps_of(Request(stop_steps=SHORT_STEPS, seed=0)) for _ in range(SHORT_RUNS)]
    relays = [relay_of(command) for _ in range(RELAYS)]
    comparison = Comparison(
        arms=({}, program.settings),
        block_steps=SWITCHED_BLOCK_STEPS,
        discard_steps=1,
        rounds=SWITCHED_ROUNDS,
    )
    switched = [
        step for step in steps_of(Request(comparison=comparison, seed=0)) if step.arm is not None
    ]
    document = {
        "command": [Path(program.command[0]).name, *program.command[1:]],
        "long_ms": [_rounded(step.step_ms) for step in long],
        "short_ms": [[_rounded(step.step_ms) for step in run] for run in short],
        "relay_ms": [
            [[_rounded(step.step_ms) for step in run if step.mark is None] for run in pair]
            for pair in relays
        ],
        "switched": {
            "settings": program.settings,
            "block_steps": SWITCHED_BLOCK_STEPS,
            "arms": [step.arm for step in switched],
            "steps_ms": [_rounded(step.step_ms) for step in switched],
        },
    }
    STEPS.mkdir(exist_ok=True)
    data = json.dumps(document, separators=(",", ":")).encode()
    (STEPS / f"{name}.json.gz").write_bytes(gzip.compress(data, mtime=0))
    seconds = time.monotonic() - started_s
    print(f"{name}: {len(long)} steps, {len(short)} short runs, {seconds:.0f} s", flush=True)


def relay_of(command: list[str]) -> tuple[list[Step], ...]:
    """The steps of two bare runs that took turns."""
    both = launch.start_relay(command, (Request(seed=0), Request(seed=0)), RELAY)
    steps = []
    for finished in both:
        process = finished.read_record().main
        assert process is not None, finished.output
        steps.append(process.steps)
    return tuple(steps)


def _rounded(step_ms: float) -> float:
    return float(f"{step_ms:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(PROGRAMS)}")
    for name in parser.parse_args().programs or PROGRAMS:
        record(name, PROGRAMS[name])


if __name__ == "__main__":
    main()
