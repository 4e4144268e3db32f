"""The shard of one program: its floor, its tune, and rounds of all arms in turns."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.outside import Results, timed
from benchmarks.suite import arms
from benchmarks.suite.cases import ROOT, Case
from flatout.tune.document import Document
from flatout.wire import codec
from flatout.wire.facts import ProgramFacts
from flatout.wire.profile import Profile
from flatout.wire.record import read_run

FIRST_RUN_STEPS = 0.3
"""Share of a timed run's steps in the run that tells whether an arm works, and fills caches."""

FIRST_RUN_SECONDS = 600.0

FLOOR_STEPS = 30

REST_OPERATORS = 8
"""Of a step under flatout's plan, those that take most of it."""

PEERS = ("accelerate", "lightning", "onnxruntime", "openvino", "transformers")
"""Packages whose versions belong to the results."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|nan|-?inf")


class Settings(NamedTuple):
    """What a run of the suite is asked for.

    Attributes:
        python: of all programs, flatout's controller apart.
        rounds: of all arms, a seed each.
        budget: of each tune.
        length: of the timed runs, as a multiple of the usual.
        only: these arms; ``None``: all.
    """

    python: Path
    rounds: int
    budget: str
    length: float = 1.0
    only: Sequence[str] | None = None


def shard(name: str, case: Case, settings: Settings, results: Results, folder: Path) -> None:
    """Measure of one program what is not in the results yet.

    Args:
        name: of the program.
        case: the program.
        settings: what is asked for.
        results: of all shards.
        folder: for the programs' files, empty.

    Raises:
        subprocess.CalledProcessError: the bare program failed, or an arm that had worked.
    """
    steps = max(3, round(case.steps * settings.length))
    python = str(settings.python)
    bare = [python, str(case.script), *case.options]
    quiet = {"stdout": subprocess.DEVNULL, "check": True, "cwd": folder}
    if case.prepare:
        subprocess.run([*bare, *case.prepare], **quiet)
    subprocess.run([*bare, "--steps", "1"], **quiet)  # fetches what data there are to fetch
    if not results.of(name, "floor"):
        results.add(name, "floor", **_work(bare, folder))
    if not results.of(name, "tune") and _is_asked("flatout", settings):
        results.add(name, "tune", **tune([*bare, "--steps", "100000"], settings.budget, folder))
    tunes = results.of(name, "tune")
    if tunes and not results.of(name, "rest"):
        results.add(name, "rest", **_rest(tunes[-1]["settings"], bare, folder))
    commands, variables = _commands(name, case, settings, results, folder)
    first_steps = max(3, round(steps * FIRST_RUN_STEPS))
    for arm, command in commands.items():
        if not any(line["arm"] == arm for line in results.of(name, "first")):
            job = [*command, "--steps", str(first_steps)]
            results.add(name, "first", arm=arm, **run_first(job, variables.get(arm), folder))
    firsts = {line["arm"]: line for line in results.of(name, "first")}
    working = {arm: job for arm, job in commands.items() if not firsts[arm]["failure"]}
    for number in range(len(results.of(name, "round")), settings.rounds):
        order = sorted(working) if number % 2 == 0 else sorted(working, reverse=True)
        jobs = {arm: [*working[arm], "--steps", str(steps), "--seed", str(number)] for arm in order}
        found = timed(jobs, folder, variables)
        for arm in found.values():
            arm["last"] = last_quarter(arm.pop("lines"))
        line = results.add(name, "round", number=number, steps=steps, arms=found)
        bare_s = line["arms"]["bare"]["step_s"]
        shown = (f"{arm} {bare_s / found[arm]['step_s']:.2f}x" for arm in sorted(found))
        print(f"{name}, round {number + 1} of {settings.rounds}: {', '.join(shown)}", flush=True)


def last_quarter(lines: Sequence[tuple[int, str]]) -> list[float]:
    """What a program printed of its steps, by number: means over the last quarter of the lines."""
    numbers = [[float(word) for word in _NUMBER.findall(text)] for _, text in lines]
    last = numbers[-max(1, len(numbers) // 4) :]
    return [sum(column) / len(column) for column in zip(*last, strict=False)]


def _is_asked(arm: str, settings: Settings) -> bool:
    return arm == "bare" or settings.only is None or arm in settings.only


def _commands(
    name: str, case: Case, settings: Settings, results: Results, folder: Path
) -> tuple[dict[str, list[str]], dict[str, dict[str, str]]]:
    """The commands of all arms that the program can have, and variables of their environments."""
    commands, variables = {}, {}
    refused = {line["arm"]: line["why"] for line in results.of(name, "not applicable")}
    beside = os.pathsep.join(filter(None, [str(case.script.parent), os.environ.get("PYTHONPATH")]))
    for arm in arms.ARMS:
        if not _is_asked(arm, settings):
            continue
        try:
            text = arms.edited(case, arm)
        except arms.NotApplicableError as reason:
            if arm not in refused:
                results.add(name, "not applicable", arm=arm, why=str(reason))
            continue
        script = folder / f"program_{arm}.py"  # not the name of a peer's module
        script.write_text(text, "utf-8")
        commands[arm] = [str(settings.python), str(script), *case.options]
        # not what an earlier program, or the user, has compiled: it would be found, and not timed
        caches = str(folder / "inductor")
        variables[arm] = {"PYTHONPATH": beside, "TORCHINDUCTOR_CACHE_DIR": caches}
    tunes = results.of(name, "tune")
    if tunes and _is_asked("flatout", settings):
        own = [str(settings.python), str(case.script), *case.options]
        plan = tunes[-1]["plan"]
        if plan is None:
            commands["flatout"] = own
        else:
            path = folder / "flatout.toml"
            path.write_text(plan, "utf-8")
            flatout = [sys.executable, "-m", "flatout", "run", "--plan", str(path), "--"]
            commands["flatout"] = [*flatout, *own]
    return commands, variables


def _work(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """What a bare step has to do, and what this machine can do at most."""
    found, ceilings = folder / "diagnosis.json", folder / "machine.json"
    options = ["--quiet", "--steps", str(FLOOR_STEPS), "--json", str(found)]
    _flatout(["doctor", *options, "--", *command], folder)
    _flatout(["machine", "--python", command[0], "--json", str(ceilings)], folder)
    diagnosis = json.loads(found.read_text())
    profile = read_run(Path(diagnosis["record"]).parent).main.profile or Profile()
    optimizers = (profile.facts or ProgramFacts()).optimizers or ()
    return {
        "diagnosis": {
            key: diagnosis[key]
            for key in ("torch", "step_ms", "phases_ms", "flops_per_step", "dtype", "operators")
        },
        "optimizers": codec.encode(optimizers),
        "machine": json.loads(ceilings.read_text()),
        "peers": _peers(command[0]),
        "commit": _commit(),
    }


def _rest(settings: Mapping[str, str], command: Sequence[str], folder: Path) -> dict[str, Any]:
    """What takes the time of a step under a plan."""
    found = folder / "rest.json"
    turned = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
    options = ["--quiet", "--steps", str(FLOOR_STEPS), "--json", str(found), *turned]
    _flatout(["doctor", *options, "--", *command], folder)
    diagnosis = json.loads(found.read_text())
    operators = (diagnosis["operators"] or [])[:REST_OPERATORS]
    return {
        "step_ms": diagnosis["step_ms"],
        "data_share": (diagnosis["phases_ms"]["data"] or 0.0) / diagnosis["mean_step_ms"],
        "operators_share": diagnosis["operators_share"],
        "operators": [{"name": o["name"], "share": o["share"]} for o in operators],
    }


def _commit() -> str | None:
    """Of flatout, as it was measured; ``None``: not known."""
    asked = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _peers(python: str) -> list[str]:
    """The versions of the peers' packages, as pip writes them."""
    listed = subprocess.run(
        [python, "-m", "pip", "freeze"], check=True, capture_output=True, text=True
    )
    return [line for line in listed.stdout.splitlines() if line.partition("==")[0] in PEERS]


def tune(command: Sequence[str], budget: str, folder: Path) -> dict[str, Any]:
    """Tune a command: the plan's text, what it claims, and what the tune took."""
    plan, document = folder / "flatout.toml", folder / "found.json"
    options = ["--budget", budget, "--plan", str(plan), "--json", str(document)]
    began_s = time.monotonic()
    _flatout(["tune", *options, "--", *command], folder)
    found = Document.read(document)
    is_plan = found.plan is not None
    return {
        "seconds": round(time.monotonic() - began_s, 1),
        "settings": dict(found.settings),
        "claim": found.claim and dataclasses.asdict(found.claim),
        "why": found.why,
        "plan": plan.read_text("utf-8") if is_plan else None,
    }


def run_first(
    command: Sequence[str], variables: Mapping[str, str] | None, folder: Path
) -> dict[str, Any]:
    """Whether a command works, and how long its first run takes, compilation included."""
    failure = None
    began_s = time.monotonic()
    try:
        subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=FIRST_RUN_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        failure = ((error.stderr or "").strip().splitlines() or [str(error)])[-1][:300]
    except subprocess.TimeoutExpired:
        failure = f"it had not come to its end after {FIRST_RUN_SECONDS:.0f} s"
    return {"failure": failure, "ran_s": round(time.monotonic() - began_s, 3)}


def _flatout(words: Sequence[str], folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "flatout", *words], cwd=folder, check=True)
