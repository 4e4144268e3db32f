"""Run flatout on programs that others maintain, and print a table of what came of it.

    python -m benchmarks.field --out field.jsonl                       # all: some three hours
    python -m benchmarks.field --out field.jsonl sb3_ppo tabnet        # these only
    python -m benchmarks.field --out field.jsonl --doctor-only tabnet  # what limits it
    python -m benchmarks.field --out field.jsonl --summary             # measures nothing
    python -m benchmarks.field --out field.jsonl --summary --publish   # writes docs/field.md

``make field`` installs the environment and measures all. The results file gets one line of JSON for
each finished measurement, so a run that was ended goes on where it was. Exits with 1 if a program
or flatout fails, if a program is slower under its plan, or if its result differs. Run it on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.field import page
from benchmarks.field.measure import Settings, measure
from benchmarks.field.program import ROOT, Installed, read_programs
from benchmarks.outside import Results

ENVIRONMENT = ROOT / ".venv-field"


def main() -> int:
    programs = read_programs()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(programs)}")
    parser.add_argument("--out", type=Path, default=Path("field.jsonl"), help="the results' file")
    parser.add_argument("--budget", help="of each tune (default: what tune chooses)")
    parser.add_argument("--pairs", type=int, default=5, help="of runs (default: 5)")
    parser.add_argument("--doctor-only", action="store_true", help="run nothing but doctor")
    parser.add_argument("--summary", action="store_true", help="only print what is measured so far")
    parser.add_argument("--publish", action="store_true", help="put the results into the project")
    parser.add_argument("--list-dependencies", action="store_true", help="for pip, and end")
    parser.add_argument(
        "--python",
        type=Path,
        default=ENVIRONMENT / "bin" / "python",
        help="interpreter with the packages ('make field' installs it)",
    )
    parser.add_argument(
        "--home",
        type=Path,
        default=ENVIRONMENT / "field",
        help="folder for data and checkouts (default: in the environment)",
    )
    arguments = parser.parse_args()
    if arguments.list_dependencies:
        print("\n".join(sorted({name for p in programs.values() for name in p.dependencies})))
        return 0
    unknown = [name for name in arguments.programs if name not in programs]
    if unknown:
        parser.error(f"there is no program {unknown[0]!r} (known: {', '.join(programs)})")
    chosen = {name: programs[name] for name in arguments.programs or programs}
    results = Results(arguments.out)
    settings = Settings(arguments.budget, arguments.pairs, arguments.doctor_only)
    for name, program in {} if arguments.summary else chosen.items():
        installed = Installed(program, arguments.python.absolute(), arguments.home.absolute())
        print(f"{name}:", flush=True, end=" ")
        try:
            installed.prepare()
        except subprocess.CalledProcessError as error:
            results.add(name, "unprepared", failure=str(error))
        else:
            measure(installed, settings, results)
        print(page.in_one_line(page.judge(program, results)), flush=True)
    verdicts = [page.judge(program, results) for program in chosen.values()]
    print(page.table(verdicts), end="")
    if arguments.publish:
        page.publish(results)
    return 1 if any(verdict.faults for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
