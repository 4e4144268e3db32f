"""Programs of the suite with ``--ranks``, against the same programs in one process.

    python -m benchmarks.ranks [--ranks 2] [PROGRAM ...] [--pairs 5] [--length 0.5] [--predict 8 64]

Both arms run under ``flatout run`` on all cores, one after the other in pairs whose order changes.
Of each run the median step time of its steady steps counts, and the whole job by an outside clock.
A speedup is the time of one process over that with ranks; printed are the median and the range of
the pairs, and rank 0's time by phases. With --predict, the scale model says how many times as fast
a step is on so many ranks of one core each as on one of them, on a host like this with as many
cores. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite.cases import CASES, ROOT, Case
from flatout.errors import UserError
from flatout.parallel.balance import Phase
from flatout.scaling import here, measured, model
from flatout.scaling.measured import MeasuredRun
from flatout.scaling.networks import Network, Software
from flatout.wire.record import read_run

FRAMEWORKS = ROOT / ".venv-frameworks/bin/python"


Host = tuple[Network, Software]
"""What exchanges take on this host."""


class Run(NamedTuple):
    """A run of a program.

    Attributes:
        step_ms: the median of its steady steps.
        job_s: the whole command.
        shares: of rank 0's time without tests, by phase; empty without ranks.
        why_whole: why calls were not shared out.
        measured: what the scale model takes from it; ``None``: it has too few steps, or nothing was
            shared out.
    """

    step_ms: float
    job_s: float
    shares: dict[str, float]
    why_whole: list[str]
    measured: MeasuredRun | None


def run(case: Case, ranks: int, steps: int, **variables: str) -> Run:
    """Run a program once, with some environment variables."""
    python = str(FRAMEWORKS) if case.places is None else sys.executable
    with tempfile.TemporaryDirectory() as home:
        own = ["run", "--ranks", str(ranks), "--"]
        program = [python, case.script.name, *case.options, "--steps", str(steps)]
        start_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "flatout", *own, *program],
            cwd=case.script.parent,
            env={**os.environ, **variables, "FLATOUT_HOME": home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=True,
        )
        job_s = time.perf_counter() - start_s
        [directory] = Path(home, "runs").iterdir()
        main = read_run(directory).main
        assert main is not None
        found = None
        with contextlib.suppress(UserError):
            found = measured.read(directory)
    work, shares, why_whole = main.shared_work, {}, []
    if work is not None:
        seconds = {name: s for name, s in work.seconds.items() if name != Phase.TESTING.value}
        shares = {name: s / sum(seconds.values()) for name, s in seconds.items()}
        why_whole = [f"{calls.count} of {calls.module}: {calls.why}" for calls in work.whole]
    step_ms = statistics.median(step.step_ms for step in main.steady_steps)
    return Run(step_ms, job_s, shares, why_whole, found)


def compare(
    name: str, ranks: int, pairs: int, length: float, predicted: Sequence[int], host: Host | None
) -> None:
    """Run pairs of a program, and print its speedups."""
    case = CASES[name]
    steps = max(12, round(case.steps * length))
    found: dict[int, list[Run]] = {1: [], ranks: []}
    for pair in range(pairs):
        for arm in (1, ranks) if pair % 2 == 0 else (ranks, 1):
            found[arm].append(run(case, arm, steps))
    one, several = found[1], found[ranks]
    print(
        f"{name:14} step {_speedups([r.step_ms for r in one], [r.step_ms for r in several])}  "
        f"job {_speedups([r.job_s for r in one], [r.job_s for r in several])}  "
        f"{pairs} pairs, {statistics.median(r.step_ms for r in one):.1f} ms a step",
        flush=True,
    )
    shares = {
        phase: statistics.median(r.shares.get(phase.value, 0.0) for r in several) for phase in Phase
    }
    words = ", ".join(f"{phase.value} {share:.1%}" for phase, share in shares.items() if share)
    print(f"{'':14} rank 0: {words}", *(f"; whole: {why}" for why in several[-1].why_whole))
    if host is not None and several[-1].measured is not None:
        several.append(run(case, 1, steps, OMP_NUM_THREADS="1"))
        runs = [found.measured for found in several if found.measured is not None]
        print(f"{'':14} {', '.join(predict(runs, host, number) for number in predicted)}")


def predict(runs: Sequence[MeasuredRun], host: Host, ranks: int) -> str:
    """Return how many times as fast a step is on some ranks as on one of them."""
    network, software = host
    larger = dataclasses.replace(network, processors=ranks)
    found = model.forecast(runs, larger, software, [ranks])
    speedup = found.predictions[0].speedup
    return f"{ranks} cores: {speedup.value:.1f}x ({speedup.low:.1f} to {speedup.high:.1f})"


def _speedups(one: Sequence[float], several: Sequence[float]) -> str:
    ratios = [first / second for first, second in zip(one, several, strict=True)]
    return f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Compare the programs that were asked for."""
    training = [name for name, case in CASES.items() if case.kind == "training"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=", ".join(training))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--length", type=float, default=0.5, help="of a run, times the suite's")
    parser.add_argument("--predict", type=int, nargs="*", default=[], help="numbers of ranks")
    arguments = parser.parse_args()
    predicted = arguments.predict
    host = here.measure(sys.executable) if predicted else None
    for name in arguments.programs or training:
        compare(name, arguments.ranks, arguments.pairs, arguments.length, predicted, host)


if __name__ == "__main__":
    main()
