"""Measure the small steps: flatout, what users can do by hand, and JAX, in turns.

    python -m benchmarks.small --out small.jsonl                # all programs: some two hours
    python -m benchmarks.small --out small.jsonl tabular ppo    # these only
    python -m benchmarks.small --out small.jsonl --summary      # measures nothing
    python -m benchmarks.small --out small.jsonl --summary --publish

In a round all arms of a program run at the same time, in turns: one goes on, the others are stopped
by a signal (``benchmarks/outside.py``). The results file gets one line of JSON for each finished
measurement, so a run that was ended goes on where it was. Exits with 1 when a measurement has
failed or a target is missed. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.outside import Results, timed
from benchmarks.small import table
from benchmarks.small.cases import ARMS, CASES, JAX_PROGRAMS, PROGRAMS, edited
from benchmarks.suite.cases import ROOT
from benchmarks.suite.measure import last_quarter, run_first, tune


class Settings(NamedTuple):
    """What a run is asked for.

    Attributes:
        python: of all programs, flatout's controller apart.
        rounds: of all arms, a seed each.
        budget: of each tune.
        arms: these only; ``None``: all.
    """

    python: Path
    rounds: int
    budget: str
    arms: Sequence[str] | None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help=f"of {', '.join(CASES)}")
    parser.add_argument("--out", type=Path, required=True, help="the file of the results")
    parser.add_argument("--rounds", type=int, default=6, help="of all arms (default: 6)")
    parser.add_argument("--budget", default="60s", help="of each tune (default: 60s)")
    parser.add_argument("--arms", help=f"only these, of {', '.join(ARMS)}, jax, flatout")
    parser.add_argument("--summary", action="store_true", help="only print what is measured so far")
    parser.add_argument("--publish", action="store_true", help="put the results into the project")
    parser.add_argument(
        "--python",
        type=Path,
        default=ROOT / ".venv-field" / "bin" / "python",
        help="interpreter with the programs' packages ('make small' installs it)",
    )
    arguments = parser.parse_args()
    unknown = [name for name in arguments.programs if name not in CASES]
    if unknown:
        parser.error(f"there is no program {unknown[0]!r} (known: {', '.join(CASES)})")
    only = arguments.arms.split(",") if arguments.arms else None
    for arm in only or ():
        if arm not in (*ARMS, "jax", "flatout"):
            parser.error(f"there is no arm {arm!r}")
    names = arguments.programs or list(CASES)
    results = Results(arguments.out)
    settings = Settings(arguments.python, arguments.rounds, arguments.budget, only)
    has_failed = False
    for name in [] if arguments.summary else names:
        with tempfile.TemporaryDirectory() as folder:
            try:
                measure(name, settings, results, Path(folder))
            except (subprocess.CalledProcessError, ValueError) as error:
                has_failed = True
                print(f"{name}: {error}\n{getattr(error, 'stderr', '') or ''}", file=sys.stderr)
    says = table.missed(results, names)
    print(table.markdown(results), end="")
    print("".join(f"- MISSED {what}\n" for what in says), end="")
    if arguments.publish:
        table.publish(results)
    return 1 if has_failed or says else 0


def measure(name: str, settings: Settings, results: Results, folder: Path) -> None:
    """Measure of one program what is not in the results yet.

    Raises:
        subprocess.CalledProcessError: the bare program failed, or an arm that had worked.
    """
    case = CASES[name]
    python, script = str(settings.python), str(PROGRAMS / f"{name}.py")
    steps = ["--steps", str(case.steps)]
    if not results.of(name, "tune") and is_asked("flatout", settings):
        found = tune([python, script, *steps], settings.budget, folder)
        results.add(name, "tune", **found)
    commands = make_commands(name, settings, results, folder)
    # Not what an earlier program, or the user, has compiled: it would be found, and not timed.
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "JAX_PLATFORMS": "cpu"}
    variables = {
        arm: {**caches, **(ARMS[arm].variables if arm in ARMS else {})} for arm in commands
    }
    for arm, command in commands.items():
        if not any(line["arm"] == arm for line in results.of(name, "first")):
            results.add(
                name, "first", arm=arm, **run_first([*command, *steps], variables[arm], folder)
            )
    firsts = {line["arm"]: line for line in results.of(name, "first")}
    working = {arm: job for arm, job in commands.items() if not firsts[arm]["failure"]}
    for number in range(len(results.of(name, "round")), settings.rounds):
        order = sorted(working) if number % 2 == 0 else sorted(working, reverse=True)
        jobs = {arm: [*working[arm], *steps, "--seed", str(number)] for arm in order}
        arms = timed(jobs, folder, variables)
        for arm in arms.values():
            arm["last"] = last_quarter(arm.pop("lines"))
        results.add(name, "round", number=number, steps=case.steps, arms=arms)
        bare_s = arms["bare"]["step_s"]
        shown = (f"{arm} {bare_s / arms[arm]['step_s']:.2f}x" for arm in sorted(arms))
        print(f"{name}, round {number + 1} of {settings.rounds}: {', '.join(shown)}", flush=True)


def is_asked(arm: str, settings: Settings) -> bool:
    return arm == "bare" or settings.arms is None or arm in settings.arms


def make_commands(
    name: str, settings: Settings, results: Results, folder: Path
) -> dict[str, list[str]]:
    """The commands of all arms that the program has."""
    python, script = str(settings.python), str(PROGRAMS / f"{name}.py")
    commands = {}
    for arm, how in ARMS.items():
        text = edited(name, how)
        if text is not None and is_asked(arm, settings):
            path = folder / f"{name}_{arm}.py"
            path.write_text(text, "utf-8")
            commands[arm] = [python, str(path)]
    peer = JAX_PROGRAMS / f"{name}.py"
    if peer.exists() and is_asked("jax", settings):
        commands["jax"] = [python, str(peer)]
    if is_asked("flatout", settings):
        plan = results.of(name, "tune")[-1]["plan"]
        words = []
        if plan is not None:
            (folder / "flatout.toml").write_text(plan, "utf-8")
            chosen = ["--plan", str(folder / "flatout.toml")]
            words = [sys.executable, "-m", "flatout", "run", *chosen, "--"]
        commands["flatout"] = [*words, python, script]
    return commands


if __name__ == "__main__":
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    sys.exit(main())
