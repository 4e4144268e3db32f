"""Real programs bare and with settings, in fresh processes, in alternation.

    python benchmarks/settings.py                          # all of them
    python benchmarks/settings.py language --pairs 6
    python benchmarks/settings.py gan --set precision=bf16 # other settings than those asked for

Each pair trains both from the same seed. The ratio of the median step times comes with its 95 %
interval over pairs. Of each loss the mean over the last quarter of the steps is compared: the
settings' mean over all seeds must lie within one standard deviation of bare's own spread between
seeds. Exits with 1 when a ratio or a loss is not as asked. Run it on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from flatout.tune import proof, trial
from flatout.tune.statistics import estimate_ratio
from flatout.wire.request import Request

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
WARMUP_STEPS = 5


class Case(NamedTuple):
    """A program, what is set, and how many times faster it should be."""

    command: tuple[str, ...]
    steps: int
    settings: dict[str, str]
    asked: float


FAST = {"precision": "bf16", "random": "fast", "optimizer": "onepass", "allocator": "keep"}

CASES = {
    "language": Case(
        (str(EXAMPLES / "language" / "train.py"), "--batch-size", "16"),
        200,
        {**FAST, "attention": "fast"},
        3.0,
    ),
    "image": Case(
        (str(EXAMPLES / "image" / "train.py"),),
        200,
        {**FAST, "memory_format": "channels_last"},
        2.5,
    ),
    "speech": Case(
        (str(EXAMPLES / "speech" / "train.py"),),
        200,
        {**FAST, "recurrent": "fused"},
        2.0,
    ),
    "gan": Case((str(HERE / "programs" / "dcgan.py"),), 500, {"precision": "safe"}, 1.5),
}


def compare(name: str, case: Case, pairs: int) -> bool:
    """Run the pairs, print what came out, and return whether it is as asked."""
    times_ms: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, list[list[float]]] = {False: [], True: []}
    for pair in range(pairs):
        for is_set in (False, True) if pair % 2 == 0 else (True, False):
            done = trial.run(
                [sys.executable, *case.command, "--steps", str(case.steps), "--seed", str(pair)],
                Request(settings=case.settings if is_set else {}),
                isolate=False,
                timeout_seconds=3600,
            )
            for event in done.process.events:
                if event.what in ("skipped", "failed") and event.subject in case.settings:
                    print(f"  {event.subject} {event.what}: {event.why}")
            steps = done.process.steps[WARMUP_STEPS:]
            times_ms[is_set].append(statistics.median(step.step_ms for step in steps))
            losses[is_set].append(
                [
                    statistics.fmean(curve[-(len(curve) // 4) :])
                    for curve in proof.extract_curves(done.process.steps)
                ]
            )
        bare_ms, set_ms = times_ms[False][-1], times_ms[True][-1]
        print(f"  {bare_ms:.1f} ms, {set_ms:.1f} ms, {bare_ms / set_ms:.2f}x", flush=True)
    ratio = estimate_ratio(
        [math.log(b / s) for b, s in zip(times_ms[False], times_ms[True], strict=True)]
    )
    is_as_asked = ratio.value >= case.asked
    words = " ".join(f"{knob}={setting}" for knob, setting in case.settings.items())
    print(f"{name} with {words}: {ratio}; asked: {case.asked}x")
    for site, (bare, with_settings) in enumerate(
        zip(zip(*losses[False], strict=True), zip(*losses[True], strict=True), strict=True)
    ):
        spread = statistics.stdev(bare)
        difference = statistics.fmean(with_settings) - statistics.fmean(bare)
        is_as_asked &= abs(difference) <= spread
        print(
            f"  loss {site}: bare {statistics.fmean(bare):.4f} with a deviation of {spread:.4f} "
            f"between {pairs} seeds, difference {difference:+.4f}",
            flush=True,
        )
    return is_as_asked


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--set", action="append", metavar="KNOB=SETTING", default=[])
    arguments = parser.parse_args()
    is_as_asked = True
    for name in arguments.cases or CASES:
        case = CASES[name]
        if arguments.set:
            case = case._replace(settings=dict(word.split("=", 1) for word in arguments.set))
        case = case._replace(steps=arguments.steps or case.steps)
        is_as_asked &= compare(name, case, arguments.pairs)
    return 0 if is_as_asked else 1


if __name__ == "__main__":
    sys.exit(main())
