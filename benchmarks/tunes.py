"""What ``flatout tune`` claims, against step times taken from outside.

    python -m benchmarks.tunes --out results.jsonl                # all nine programs
    python -m benchmarks.tunes --out results.jsonl dcgan hf       # these only
    python -m benchmarks.tunes --out results.jsonl --summary      # measures nothing

Each program is tuned, and then run bare and under ``flatout run`` with the plan, a seed for each
pair. The two of a pair take turns from their second line on, timed from outside (``outside.py``).
Seconds a step are the time of the turns over their steps. That leaves out start-up, warm-up and
end, and has all that the program does between its steps, as the claim has.

A results file gets one line of JSON for each finished measurement, so a run that was ended goes on
where it was, and several may share the file. Exits with 1 when a target is missed or a program
lacks its measurement. Run it on a machine that does nothing else: a program takes some 10 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.outside import Results, timed
from flatout.tune.document import Document
from flatout.tune.statistics import estimate_ratio
from flatout.wire.ratios import Ratio

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
PROGRAMS = HERE / "programs"
FRAMEWORKS = Path(
    os.environ.get(
        "FLATOUT_TEST_FRAMEWORKS_PYTHON", HERE.parent / ".venv-frameworks" / "bin" / "python"
    )
)

MINIMUM_PAIRS = 5
TUNING_SECONDS, TUNING_STEPS = 300.0, 600
"""A tune may take this long, or as long as so many bare steps."""

ALLOWED_HALF_WIDTH = 0.05
ALLOWED_DISAGREEMENTS = 1
NEVER_SLOWER = 0.97
"""What the lower bound of every independent ratio must reach."""

GAN_RATIO = 1.5
NO_PLAN = Ratio(1.0, 1.0, 1.0, 0)


class Program(NamedTuple):
    """A program, and the steps of the runs that are timed.

    Attributes:
        words: script and arguments, as they are tuned; ``--steps`` and ``--seed`` are added.
        steps: of a run that is timed from outside, about ten seconds bare.
        frameworks: it needs the interpreter that has transformers and Lightning.
        asked: how many times faster it has to be.
    """

    words: tuple[str, ...]
    steps: int
    frameworks: bool = False
    asked: float = 0.0


CASES = {
    "image": Program((str(EXAMPLES / "image" / "train.py"), "--epochs", "40"), 300),
    "language": Program((str(EXAMPLES / "language" / "train.py"),), 130),
    "speech": Program((str(EXAMPLES / "speech" / "train.py"), "--epochs", "60"), 260),
    "dcgan": Program((str(PROGRAMS / "dcgan.py"), "--steps", "2000"), 60, asked=GAN_RATIO),
    "lstm_by_hand": Program((str(PROGRAMS / "lstm_by_hand.py"),), 300),
    "jpeg": Program((str(PROGRAMS / "jpeg.py"),), 400),
    "python_bound": Program((str(PROGRAMS / "python_bound.py"),), 7_000),
    "hf": Program((str(PROGRAMS / "hf_encoder.py"),), 100, frameworks=True),
    "lightning": Program((str(PROGRAMS / "lightning_cnn.py"),), 300, frameworks=True),
}


class Interval(NamedTuple):
    """An estimate and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def quotient(one: Ratio, other: Ratio) -> Interval:
    """The quotient of two independent ratios.

    On the log scale the distances of the bounds add in squares, each of the one with the opposite
    of the other (Zou and Donner 2008, "Construction of confidence limits about effect measures").
    """
    centre = math.log(one.value / other.value)
    down = math.hypot(math.log(one.value / one.low), math.log(other.high / other.value))
    up = math.hypot(math.log(one.high / one.value), math.log(other.value / other.low))
    return Interval(math.exp(centre), math.exp(centre - down), math.exp(centre + up))


def tune(command: Sequence[str], budget: str, folder: Path) -> dict[str, Any]:
    """Tune a command; what it claims, the plan's text, and how many seconds it took.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    plan, document = folder / "flatout.toml", folder / "found.json"
    plan.unlink(missing_ok=True)
    options = ["--budget", budget, "--plan", str(plan), "--json", str(document)]
    began_s = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "flatout", "tune", *options, "--", *command], cwd=folder, check=True
    )
    seconds = time.monotonic() - began_s
    found = Document.read(document)
    has_plan = found.plan is not None and found.claim is not None
    return {
        "seconds": round(seconds, 1),
        "settings": dict(found.settings),
        "why": found.why,
        "claimed": dataclasses.asdict(found.claim) if has_plan else None,
        "plan": plan.read_text("utf-8") if has_plan else None,
    }


def measure(
    name: str, command: Sequence[str], steps: int, pairs: int, budget: str, results: Results
) -> None:
    """Do what is not in the results yet.

    Raises:
        subprocess.CalledProcessError: a command failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tunes = results.of(name, "tune")
        if not tunes:
            # Data that the program fetches for itself would not outlive a trial.
            subprocess.run(
                [*command, "--steps", "1"], cwd=folder, stdout=subprocess.DEVNULL, check=True
            )
            tunes = [results.add(name, "tune", **tune(command, budget, folder))]
        tuned = tunes[-1]
        if tuned["plan"] is None:
            if tuned["seconds"] > TUNING_SECONDS and not results.of(name, "bare"):
                job = [*command, "--steps", str(steps)]
                results.add(name, "bare", **timed({"bare": job}, folder)["bare"])
            return
        plan = folder / "flatout.toml"
        plan.write_text(tuned["plan"], "utf-8")
        with_plan = [sys.executable, "-m", "flatout", "run", "--plan", str(plan), "--"]
        for number in range(len(results.of(name, "pair")), pairs):
            job = [*command, "--steps", str(steps), "--seed", str(number)]
            sides = {"bare": job, "plan": [*with_plan, *job]}
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            pair = timed({side: sides[side] for side in order}, folder)
            results.add(name, "pair", number=number, steps=steps, **pair)
            for line in pair["plan"]["said"][:-1]:  # the last one sums the run up
                print(line)
            bare_s, plan_s = pair["bare"]["step_s"], pair["plan"]["step_s"]
            print(
                f"{name}, pair {number + 1} of {pairs}: {1e3 * bare_s:.4g} ms bare, "
                f"{1e3 * plan_s:.4g} ms with the plan, {bare_s / plan_s:.3f}x",
                flush=True,
            )


class Verdict(NamedTuple):
    """What came out for one program.

    Attributes:
        settings: of the plan.
        claimed, independent: bare step time over the plan's.
        agreement: their quotient.
        tuning_s, allowed_s: seconds that the tune took, and might take.
        missed: targets, in words, but for the agreement, of which one may fail.
    """

    settings: Mapping[str, str]
    claimed: Ratio
    independent: Ratio
    agreement: Interval
    tuning_s: float
    allowed_s: float
    missed: list[str]

    @property
    def agrees(self) -> bool:
        return self.agreement.low <= 1 <= self.agreement.high


def judge(name: str, results: Results) -> Verdict | None:
    """The verdict, ``None`` as long as there is no tune, or fewer than ``MINIMUM_PAIRS`` pairs."""
    tunes, pairs = results.of(name, "tune"), results.of(name, "pair")
    if not tunes or (tunes[-1]["claimed"] and len(pairs) < MINIMUM_PAIRS):
        return None
    tuned = tunes[-1]
    claim = independent = NO_PLAN
    if tuned["claimed"]:
        claim = Ratio(**tuned["claimed"])
        independent = estimate_ratio(
            [math.log(p["bare"]["step_s"] / p["plan"]["step_s"]) for p in pairs]
        )
    bare_s = [p["bare"]["step_s"] for p in pairs]
    bare_s += [bare["step_s"] for bare in results.of(name, "bare")]
    allowed_s = max(TUNING_SECONDS, TUNING_STEPS * statistics.median(bare_s) if bare_s else 0.0)
    agreement = quotient(claim, independent)
    missed = []
    if tuned["seconds"] > allowed_s:
        missed.append(f"tuned for {tuned['seconds']:.0f} s, allowed: {allowed_s:.0f} s")
    if independent.low < NEVER_SLOWER:
        missed.append(f"may be slower than bare: {independent}")
    if independent.value < CASES[name].asked:
        missed.append(f"asked: {CASES[name].asked}x, measured: {independent}")
    if agreement.half_width > ALLOWED_HALF_WIDTH:
        missed.append(f"the quotient is known to {agreement.half_width:.1%} only")
    return Verdict(
        tuned["settings"], claim, independent, agreement, tuned["seconds"], allowed_s, missed
    )


def summary(names: Sequence[str], results: Results) -> tuple[list[str], bool]:
    """The table of the programs, what is missed, and whether nothing is."""
    lines = [
        f"{'program':13} {'claimed':26} {'independent':26} {'quotient':22} {'+-':>6} "
        f"{'tuned':>6} {'of':>6}"
    ]
    missed: list[str] = []
    disagreeing = []
    for name in names:
        verdict = judge(name, results)
        if verdict is None:
            missed.append(f"{name}: not measured to its end")
            continue
        value, low, high = verdict.agreement
        lines.append(
            f"{name:13} {_shown(verdict.claimed):26} {_shown(verdict.independent):26} "
            f"{f'{value:.3f} ({low:.3f} to {high:.3f})':22} {verdict.agreement.half_width:6.1%} "
            f"{verdict.tuning_s:5.0f}s {verdict.allowed_s:5.0f}s"
        )
        settings = (f"{knob}={setting}" for knob, setting in verdict.settings.items())
        lines.append(f"{'':13} {' '.join(settings) or results.of(name, 'tune')[-1]['why']}")
        missed += [f"{name}: {what}" for what in verdict.missed]
        if not verdict.agrees:
            disagreeing.append(name)
    if len(disagreeing) > ALLOWED_DISAGREEMENTS:
        missed.append(f"claimed and independent ratio disagree: {', '.join(disagreeing)}")
    elif disagreeing:
        lines.append(f"claimed and independent ratio disagree for {disagreeing[0]}")
    lines += [f"MISSED {what}" for what in missed]
    return lines, not missed


def _shown(ratio: Ratio) -> str:
    return str(ratio) if ratio.pairs else "no plan"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, required=True, help="the file of the results")
    parser.add_argument("--pairs", type=int, default=8, help="of runs, at least 5 (default: 8)")
    parser.add_argument("--steps", type=int, help="of a run that is timed from outside")
    parser.add_argument("--budget", default="5m", help="of each tune (default: 5m)")
    parser.add_argument("--summary", action="store_true", help="only print what is measured so far")
    parser.add_argument(
        "--frameworks-python",
        type=Path,
        default=FRAMEWORKS,
        metavar="PYTHON",
        help="interpreter with transformers and Lightning",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.programs if name not in CASES]
    if unknown:
        parser.error(f"there is no program {unknown[0]!r} (known: {', '.join(CASES)})")
    if arguments.pairs < MINIMUM_PAIRS:
        parser.error(f"--pairs must be at least {MINIMUM_PAIRS}")
    names = arguments.programs or list(CASES)
    results = Results(arguments.out)
    for name in [] if arguments.summary else names:
        program = CASES[name]
        python = arguments.frameworks_python if program.frameworks else Path(sys.executable)
        if not python.exists():
            print(f"{name} is left out: {python} is not there, 'make frameworks' installs it")
            continue
        try:
            measure(
                name,
                [str(python), *program.words],
                arguments.steps or program.steps,
                arguments.pairs,
                arguments.budget,
                results,
            )
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error}\n{error.stderr or ''}", file=sys.stderr)
    lines, is_as_asked = summary(names, results)
    print("\n".join(lines))
    return 0 if is_as_asked else 1


if __name__ == "__main__":
    sys.exit(main())
