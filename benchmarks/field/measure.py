"""The measurements of one program of the field.

In order: doctor; the bare program with several seeds, for the spread of its result; tune; pairs of
the bare program and the same under its plan, timed from outside from start to end. Each is one line
in the results, with the failure if there was one, and is not repeated once it is there.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.field.program import Installed
from benchmarks.outside import Results
from flatout.tune.document import Document

SEEDS = 3
"""The runs of the bare program whose results show its spread from seed to seed."""

LIMIT_S = 900.0
"""A run, or a doctor, that takes longer counts as hung."""

TUNE_LIMIT_S = 3600.0
"""Likewise a tune."""

LAST_LINES = 12
"""Of what a failed command printed, so many lines are kept."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        budget: of each tune; ``None``: what tune chooses.
        pairs: of runs of the bare program and of the program with its plan.
        doctor_only: nothing but doctor is run.
    """

    budget: str | None
    pairs: int
    doctor_only: bool = False


def measure(installed: Installed, settings: Settings, results: Results) -> None:
    """Measure of one program what is not in the results yet."""
    name = installed.program.name
    if not results.of(name, "doctor"):
        results.add(name, "doctor", **_diagnose(installed))
    if settings.doctor_only:
        return
    for seed in range(len(results.of(name, "bare")), SEEDS):
        results.add(name, "bare", seed=seed, **_run(installed, [], seed))
    if not results.of(name, "watched"):
        # Without a plan flatout only watches, and must change nothing.
        results.add(name, "watched", **_run(installed, _flatout("run", "--"), 0))
    if not results.of(name, "tune"):
        results.add(name, "tune", **_tune(installed, settings.budget))
    tuned = results.of(name, "tune")[-1]
    if not tuned["plan"]:
        return
    with tempfile.TemporaryDirectory() as scratch:
        plan = Path(scratch, "flatout.toml")
        plan.write_text(tuned["plan"], "utf-8")
        under_plan = _flatout("run", "--plan", str(plan), "--")
        for number in range(len(results.of(name, "pair")), settings.pairs):
            sides = {"bare": [], "plan": under_plan}
            order = list(sides) if number % 2 == 0 else list(reversed(sides))
            pair = {side: _run(installed, sides[side], 0) for side in order}
            results.add(name, "pair", number=number, **pair)


def _diagnose(installed: Installed) -> dict[str, Any]:
    installed.clear()
    with tempfile.TemporaryDirectory() as scratch:
        document = Path(scratch, "diagnosis.json")
        asked = _flatout("doctor", "--quiet", "--json", str(document), "--")
        done = _call(installed, [*asked, *installed.command(0)], LIMIT_S)
        if done["failure"] is not None:
            return {"failure": done["failure"], "seconds": done["seconds"]}
        found = json.loads(document.read_text("utf-8"))
    kept = ("trains", "steps", "micro_batches", "step_ms", "mean_step_ms", "phases_ms", "findings")
    return {"failure": None, "seconds": done["seconds"], **{key: found[key] for key in kept}}


def _tune(installed: Installed, budget: str | None) -> dict[str, Any]:
    installed.clear()
    with tempfile.TemporaryDirectory() as scratch:
        plan, document = Path(scratch, "flatout.toml"), Path(scratch, "found.json")
        options = ["--budget", budget] if budget else []
        options += ["--plan", str(plan), "--json", str(document), "--"]
        done = _call(installed, [*_flatout("tune", *options), *installed.command(0)], TUNE_LIMIT_S)
        common = {"seconds": done["seconds"], "said": done["errors"]}
        if not document.exists():
            return {**common, "failure": done["failure"] or "it wrote no document", "plan": None}
        found = Document.read(document)
        has_plan = found.plan is not None and found.claim is not None
        return {
            **common,
            "failure": None,
            "settings": dict(found.settings) if has_plan else {},
            "why": found.why,
            "claim": dataclasses.asdict(found.claim) if has_plan else None,
            "plan": plan.read_text("utf-8") if has_plan else None,
        }


def _run(installed: Installed, before: Sequence[str], seed: int) -> dict[str, Any]:
    """Run the program from start to end: its result, its own clock, and the time from outside."""
    installed.clear()
    done = _call(installed, [*before, *installed.command(seed)], LIMIT_S)
    output = done.pop("output")
    said = [line for line in done.pop("errors").splitlines() if line.startswith("flatout: ")]
    result = installed.program.read_result(output)
    if done["failure"] is None and result is None:
        done["failure"] = "it printed no result: " + _last_lines(output)
    return {
        **done,
        "result": result,
        "clock_s": installed.program.read_clock_s(output),
        "said": said,
    }


def _call(installed: Installed, command: Sequence[str], limit_s: float) -> dict[str, Any]:
    """Run a command: what it printed on both streams, how long it took, why it failed."""
    began_s = time.monotonic()
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        failure = None
        try:
            code = subprocess.run(
                command,
                cwd=installed.working_folder,
                env=installed.environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                timeout=limit_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            failure = f"it had not come to its end after {limit_s:.0f} s"
        seconds = time.monotonic() - began_s
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    if failure is None and code:
        failure = f"exit code {code}: {_last_lines(texts[1] or texts[0])}"
    return {
        "seconds": round(seconds, 3),
        "failure": failure,
        # Progress bars return to the beginning of their line.
        "output": (texts[0] + "\n" + texts[1]).replace("\r", "\n"),
        "errors": texts[1],
    }


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-LAST_LINES:])


def _flatout(*words: str) -> list[str]:
    return [sys.executable, "-m", "flatout", *words]
