"""Gains that replayed calls predict, beside gains that are measured, on the programs of the suite.

    python benchmarks/predictions.py cnn gpt --to predictions.jsonl    # measure, add to the file
    python benchmarks/predictions.py --to predictions.jsonl            # print what the file holds

A program runs twice. The first run is profiled, and its calls are replayed, as in the first run of
a tune. In the second run, the bare program and each predicted setting take turns in one process
(``agent/switch.py``). The error of a prediction is its quotient with the measured gain, less 1. Run
it on a machine that does nothing else; a program takes about a minute.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from flatout.doctor.case import Case as Profiled
from flatout.tune import candidates, prediction, trial
from flatout.tune.ledger import Options
from flatout.tune.pairs import Pace
from flatout.tune.screen import size_comparison
from flatout.tune.statistics import find_complete_blocks
from flatout.wire.ratios import Ratio, estimate_arm_ratios
from flatout.wire.request import Request

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.suite.cases import CASES

PROFILED_S = 3.0
"""The time of the steps before the profile."""

COMPARED_S = 40.0
"""The time of the comparison of all settings of a program."""

LIMIT_S = 900.0


class Row(NamedTuple):
    """A setting of a program; all ratios have their intervals."""

    program: str
    setting: str
    predicted: tuple[float, float, float]
    measured: tuple[float, float, float]
    step_ms: float
    replay_s: float

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.predicted[0] / self.measured[0] - 1

    @property
    def agrees(self) -> bool:
        """Whether the two intervals overlap."""
        return self.predicted[1] <= self.measured[2] and self.measured[1] <= self.predicted[2]


def measure(name: str) -> list[Row]:
    """Predict and measure the gains of a program's settings."""
    case = CASES[name]
    command = [sys.executable, str(case.script), *case.options]
    options = Options()
    request = Request(
        seed=0,
        stop_steps=2000,
        stop_seconds=PROFILED_S,
        profile_steps=5,
        replay=prediction.make_request(options),
    )
    process = trial.run(command, request, isolate=False, timeout_seconds=LIMIT_S).process
    for event in process.events:
        if event.subject == "replay":
            print(f"  replay {event.what}: {event.why}", file=sys.stderr)
    replayed = process.replayed
    if replayed is None:
        return []
    step_ms = statistics.median(step.step_ms for step in process.timed_steps)
    found = candidates.survey(process, None, None, None)
    share = Profiled(process).all_operators_share
    kept, dropped = prediction.sort_out(found, replayed, step_ms, share)
    predicted = prediction.predict_candidates(replayed, step_ms, [*kept.candidates, *dropped])
    arms = ({}, *(one.settings for one in predicted))
    comparison = size_comparison(
        arms, None, limit_s=COMPARED_S, pace=Pace(0.0, step_ms / 1e3), job_steps=None
    )
    done = trial.run(
        command, Request(comparison=comparison, seed=0), isolate=False, timeout_seconds=LIMIT_S
    )
    ratios = estimate_arm_ratios(find_complete_blocks(done.process.loop_steps, comparison))
    return [
        Row(
            name,
            str(one),
            _values(made.alone),
            _values(ratios[number]),
            step_ms,
            replayed.seconds,
        )
        for number, (one, made) in enumerate(predicted.items(), 1)
        if number in ratios
    ]


def _values(ratio: Ratio) -> tuple[float, float, float]:
    return ratio.value, ratio.low, ratio.high


def report(rows: list[Row]) -> None:
    """Print the table and the median error."""
    print(f"{'program':16}{'setting':32}{'predicted':24}{'measured':24}error")
    for row in rows:
        shown = [f"{x[0]:.2f}x ({x[1]:.2f} to {x[2]:.2f})" for x in (row.predicted, row.measured)]
        print(f"{row.program:16}{row.setting:32}{shown[0]:24}{shown[1]:24}{row.error:+.1%}")
    if rows:
        errors = [abs(math.log1p(row.error)) for row in rows]
        overlap = sum(row.agrees for row in rows)
        print(
            f"median relative error {math.expm1(statistics.median(errors)):.1%}, "
            f"largest {math.expm1(max(errors)):.1%}; intervals overlap in {overlap} of {len(rows)}"
        )


def main() -> None:
    """Measure the programs that are named, and report on all of the file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("programs", nargs="*", choices=[*CASES, []])
    parser.add_argument("--to", type=Path, required=True, help="the file of the results")
    arguments = parser.parse_args()
    for name in arguments.programs:
        with arguments.to.open("a") as file:
            for row in measure(name):
                file.write(json.dumps(row) + "\n")
    rows = []
    if arguments.to.exists():
        lines = arguments.to.read_text().splitlines()
        rows = [Row(*json.loads(line)) for line in lines]
    report(rows)


if __name__ == "__main__":
    main()
