"""The predictions of ``flatout scale`` against what is measured: programs of the suite, here.

    python -m benchmarks.scale [--ranks 2 4] [--repeats 3] [--steps 60] [--link 200mbit]
                               [--save FILE] [PROGRAM ...]

Each program runs alone and with two ranks, one thread each. From these two records its step is
predicted for the numbers of ranks; all ranks are on this host, and take turns on its cores where
they are too many. Then it runs afresh with each number of ranks. Printed are, for each run, what
was predicted with its 90 % interval and what was measured, the mean of its steady steps; at the end
the median error, and how often the interval holds. Run it on a machine that does nothing else.

With ``--link``, each rank is a host of its own: a network namespace whose link has this rate (tc,
tbf), pinned to a core. That needs root and iproute2. Predicted is then the step over a network of
this rate, with what exchanges over gloo take otherwise measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.suite.cases import CASES, Case
from flatout import launch
from flatout.launch import companions
from flatout.scaling import here, measured, model
from flatout.scaling.measured import MeasuredRun
from flatout.scaling.model import Interval
from flatout.scaling.networks import Network, Software
from flatout.wire.record import read_run
from flatout.wire.request import Request
from tests import namespaces

WARMUP_STEPS = 3

SETTLED_STEPS = 10
"""First steps on hosts that do not count: calls are tested in the first and in the eighth."""

TCP_SHARE = 1448 / 1514
"""Of the bytes that tbf counts, those that a user of TCP gets: it counts the Ethernet header."""


class Comparison(NamedTuple):
    """A run against its prediction.

    Attributes:
        program, ranks: what has run.
        predicted_s: the time of a step.
        measured_s: the mean of its steady steps.
    """

    program: str
    ranks: int
    predicted_s: Interval
    measured_s: float

    @property
    def error(self) -> float:
        """Of the prediction, in parts of what was measured."""
        return self.predicted_s.value / self.measured_s - 1

    @property
    def holds(self) -> bool:
        """Whether what was measured is in the interval."""
        return self.predicted_s.low <= self.measured_s <= self.predicted_s.high


def run(case: Case, ranks: int, steps: int) -> MeasuredRun:
    """Run a program with one thread a rank, and stop it after some steps."""
    os.environ["OMP_NUM_THREADS"] = str(ranks)  # each rank gets its part
    several = companions.make_ranks(ranks) if ranks > 1 else None
    os.chdir(case.script.parent)
    finished = launch.start(
        [sys.executable, case.script.name, *case.options],
        Request(stop_steps=steps + WARMUP_STEPS, ranks=several),
        isolate=True,
        output="capture",
    )
    record = finished.read_record()
    if finished.returncode != 0 or record.main is None:
        raise SystemExit(f"{case.script} has failed with {ranks} ranks: {finished.output}")
    if ranks == 1:
        return measured.measure_alone(record.main)
    return measured.measure_ranks(record, ranks)


def run_on_hosts(case: Case, count: int, steps: int, rate: str) -> float:
    """Run a program on so many hosts with one rank each; returns the mean step in seconds."""
    hosts = namespaces.Hosts(count)
    try:
        with tempfile.TemporaryDirectory() as folder:
            started = []
            for number in range(count):
                limit = ("tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
                shape = ["tc", "qdisc", "add", "dev", "eth0", "root", *limit]
                subprocess.run(hosts.command(number, shape), check=True)
                core = str(number % (os.cpu_count() or 1))
                own = ["--nodes", str(count), "--rendezvous", f"{hosts.addresses[0]}:29500"]
                words = [sys.executable, "-m", "flatout", "run", *own, "--ranks", "1", "--"]
                program = [sys.executable, case.script.name, *case.options, "--steps", str(steps)]
                variables = {
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "FLATOUT_HOME": f"{folder}/{number}",
                }
                words = ["taskset", "-c", core, *words, *program]
                started.append(hosts.start(number, words, case.script.parent, variables))
            for process in started:
                _, stderr = process.communicate()
                if process.returncode != 0:
                    raise SystemExit(f"{case.script} has failed on {count} hosts: {stderr}")
            [directory] = Path(folder, "0", "runs").iterdir()
            main = read_run(directory).main
            assert main is not None
            times_ms = [step.step_ms for step in main.steps]
            return statistics.fmean(times_ms[SETTLED_STEPS:]) / 1e3
    finally:
        hosts.close()


def compare(
    name: str,
    ranks: Sequence[int],
    repeats: int,
    steps: int,
    host: tuple[Network, Software],
    rate: str | None,
) -> list[Comparison]:
    """Predict a program, and measure it."""
    case = CASES[name]
    runs = [run(case, 2, steps), run(case, 1, steps)]
    forecast = model.forecast(runs, *host, ranks)
    found = []
    for _ in range(repeats):
        for prediction in forecast.predictions:
            if rate is None:
                step_s = float(run(case, prediction.ranks, steps).step_s.mean())
            else:
                step_s = run_on_hosts(case, prediction.ranks, steps, rate)
            one = Comparison(name, prediction.ranks, prediction.step_s, step_s)
            found.append(one)
            low, high = one.predicted_s.low * 1e3, one.predicted_s.high * 1e3
            print(
                f"{name:14} {one.ranks} ranks: predicted {one.predicted_s.value * 1e3:.1f} ms "
                f"({low:.1f} to {high:.1f}), measured {step_s * 1e3:.1f} ms, "
                f"error {one.error:+.0%}{'' if one.holds else ', outside of the interval'}",
                flush=True,
            )
    return found


def main() -> None:
    """Compare the programs that were asked for."""
    training = [
        name for name, case in CASES.items() if case.kind == "training" and case.places is not None
    ]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=", ".join(training))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repeats", type=int, default=3, help="runs with each number of ranks")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run that count")
    parser.add_argument("--link", metavar="RATE", help="of each host, as tc has it: 200mbit, 1gbit")
    parser.add_argument("--save", type=Path, help="write all comparisons to this file, as JSON")
    arguments = parser.parse_args()
    save = None if arguments.save is None else arguments.save.absolute()
    os.environ["OMP_NUM_THREADS"] = "2"
    network, software = here.measure(sys.executable, over_gloo=arguments.link is not None)
    if arguments.link is not None:
        bits_per_s = 1e6 * float(arguments.link.replace("gbit", "000mbit").removesuffix("mbit"))
        byte_s = 8 / bits_per_s / TCP_SHARE
        network = replace(network, name=arguments.link, seconds_per_byte=byte_s, is_copied=False)
    host = network, software
    print(*host, sep="\n", flush=True)
    found = []
    for name in arguments.programs or training:
        found += compare(
            name, arguments.ranks, arguments.repeats, arguments.steps, host, arguments.link
        )
    errors = [abs(one.error) for one in found]
    coverage = statistics.fmean(one.holds for one in found)
    print(
        f"{len(found)} runs: median error {statistics.median(errors):.1%}, the "
        f"{model.COVERAGE:.0%} interval holds in {coverage:.0%}"
    )
    if save is not None:
        rows = [one._asdict() | {"predicted_s": asdict(one.predicted_s)} for one in found]
        save.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
