"""Step times of real programs, recorded for ``replay.py``.

    python benchmarks/record_steps.py                # all programs, one to two minutes each
    python benchmarks/record_steps.py mlp gan

Of each program: some long runs; some pairs of runs with the same seed that take turns
(``agent/relay.py``); and one comparison inside a process, in which a real knob is turned on and
off, which shows what a switch leaves behind. Written to ``steps/PROGRAM.json.gz``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from flatout import launch
from flatout.tune import trial
from flatout.tune.pairs import RELAY_BLOCK_STEPS
from flatout.wire.ratios import Size
from flatout.wire.record import Step
from flatout.wire.request import Comparison, Relay, Request

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
STEPS = HERE / "steps"

LONG_RUNS = 2
LONG_SECONDS, MOST_LONG_STEPS = 25.0, 3000
RELAYS = 3
RELAY = Relay("", 0, block_steps=RELAY_BLOCK_STEPS, blocks=15)
SWITCHED_ROUNDS, SWITCHED_BLOCK_STEPS = 12, 12
WARMUP_STEPS = 10
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
    started_s = time.monotonic()
    switched = switched_of(command, program.settings)
    relays = [relay_of(command) for _ in range(RELAYS)]
    long_steps = min(
        MOST_LONG_STEPS, round(LONG_SECONDS * 1e3 / statistics.median(switched["steps_ms"]))
    )
    # A comparison of nothing with nothing: it notes the sizes of the steps.
    nothing = Comparison(
        arms=({},),
        block_steps=long_steps,
        discard_steps=0,
        warmup_steps=WARMUP_STEPS,
        first_steps=0,
        rounds=1,
    )
    longs = [
        trial.run(
            command,
            Request(comparison=nothing, seed=seed),
            isolate=False,
            timeout_seconds=600,
        )
        for seed in range(LONG_RUNS)
    ]
    startup_s = min(one.seconds - sum(s.step_ms for s in one.process.steps) / 1e3 for one in longs)
    steps = [step for one in longs for step in one.process.steps if step.arm is not None]
    write(
        name,
        {
            "startup_s": round(startup_s, 1),
            "long_ms": [_rounded(step.step_ms) for step in steps],
            "long_sizes": [Size.of(step) for step in steps],
            "relay_block_steps": RELAY.block_steps - RELAY.discard_steps,
            "relay_ms": [
                [[_rounded(step.step_ms) for step in run if step.mark is None] for run in pair]
                for pair in relays
            ],
            "switched": switched,
        },
    )
    print(f"{name}: {time.monotonic() - started_s:.0f} s", flush=True)


def switched_of(command: list[str], settings: dict[str, str]) -> dict[str, Any]:
    """A comparison of the settings with the bare program, all of its steps."""
    comparison = Comparison(
        arms=({}, settings),
        block_steps=SWITCHED_BLOCK_STEPS,
        discard_steps=1,
        first_steps=0,
        rounds=SWITCHED_ROUNDS,
    )
    done = trial.run(command, Request(comparison=comparison), isolate=False, timeout_seconds=600)
    steps = [step for step in done.process.steps if step.arm is not None]
    return {
        "settings": settings,
        "block_steps": SWITCHED_BLOCK_STEPS,
        "arms": [step.arm for step in steps],
        "steps_ms": [_rounded(step.step_ms) for step in steps],
        "sizes": [Size.of(step) for step in steps],
    }


def write(name: str, document: dict[str, Any]) -> None:
    """Write what was recorded of a program."""
    STEPS.mkdir(exist_ok=True)
    data = json.dumps(document, separators=(",", ":")).encode()
    (STEPS / f"{name}.json.gz").write_bytes(gzip.compress(data, mtime=0))


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
