"""Measure the suite, a program at a time, and write what came out.

    python -m benchmarks.suite --out results.jsonl                # all programs: some four hours
    python -m benchmarks.suite --out results.jsonl gpt dcgan      # these only
    python -m benchmarks.suite --out results.jsonl --quick gpt    # short runs, two rounds
    python -m benchmarks.suite --out results.jsonl --summary      # measures nothing
    python -m benchmarks.suite --out results.jsonl --summary --publish

In a round all arms of a program run at the same time, in turns: one goes on, the others are stopped
by a signal (``benchmarks/outside.py``). The results file gets one line of JSON for each finished
measurement, so a run that was ended goes on where it was. Exits with 1 when a measurement has
failed or a target is missed, to which short runs are not held. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.outside import Results
from benchmarks.suite import arms, publish, table
from benchmarks.suite.cases import CASES, ROOT
from benchmarks.suite.measure import Settings, shard

QUICK_LENGTH, QUICK_ROUNDS, QUICK_BUDGET = 0.5, 2, "90s"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, required=True, help="the file of the results")
    parser.add_argument("--rounds", type=int, default=6, help="of all arms (default: 6)")
    parser.add_argument("--budget", default="5m", help="of each tune (default: 5m)")
    parser.add_argument("--arms", help=f"only these, of {', '.join(arms.ARMS)}, flatout")
    parser.add_argument("--quick", action="store_true", help="short runs, two rounds, short tunes")
    parser.add_argument("--summary", action="store_true", help="only print what is measured so far")
    parser.add_argument("--publish", action="store_true", help="put the results into the project")
    parser.add_argument(
        "--python",
        type=Path,
        default=ROOT / ".venv-suite" / "bin" / "python",
        help="interpreter with the peers ('make bench' installs it)",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.programs if name not in CASES]
    if unknown:
        parser.error(f"there is no program {unknown[0]!r} (known: {', '.join(CASES)})")
    only = arguments.arms.split(",") if arguments.arms else None
    for arm in only or ():
        if arm not in (*arms.ARMS, "flatout"):
            parser.error(f"there is no arm {arm!r}")
    names = arguments.programs or list(CASES)
    results = Results(arguments.out)
    settings = Settings(arguments.python, arguments.rounds, arguments.budget, only=only)
    if arguments.quick:
        settings = Settings(arguments.python, QUICK_ROUNDS, QUICK_BUDGET, QUICK_LENGTH, only)
    has_failed = False
    for name in [] if arguments.summary else names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                shard(name, CASES[name], settings, results, Path(folder))
            except (subprocess.CalledProcessError, ValueError) as error:
                has_failed = True
                print(f"{name}: {error}\n{getattr(error, 'stderr', '') or ''}", file=sys.stderr)
    says = [] if arguments.quick else table.missed(publish.judged(results), names)
    print(publish.markdown(results, says), end="")
    if arguments.publish:
        publish.publish(results)
    return 1 if has_failed or says else 0


if __name__ == "__main__":
    sys.exit(main())
