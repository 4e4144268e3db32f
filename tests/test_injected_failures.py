"""A failure in any function of ours that a step reaches leaves the program as it is without us.

``injection.py`` runs a program once for each function of the agent and of the knobs that is entered
while it runs, and has it raise at its first entry; ``make injected``: at its second and seventh.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flatout import knobs

ELSEWHERE = {"flash", "cudnn", "efficient", "reduce-overhead"}
"""Settings for CUDA of knobs that are for the CPU as well."""

ALIKE = {"regional", "dynamic", "max-autotune", "half", "all"}
"""One way of compiling, and one number of threads, is enough."""

WITH_PROCESSES = {"workers", "parallel"}
"""Settings that start processes of their own, which take too long for so many runs."""

SETTINGS = [
    f"{name}={setting}"
    for name, knob in knobs.registry().items()
    if knob.hot and "cpu" in knob.platforms
    for setting in knob.settings
    if setting not in ELSEWHERE | ALIKE | WITH_PROCESSES
]

BORDERS = {
    "intercept/containment.py": "what contains the failures of all others",
    "intercept/patch.py": "what torch calls in the place of a function; it only calls containment",
    "intercept/dispatch.py:_call": "what torch's dispatcher calls; it only calls attempt",
    "intercept/dispatch.py:_call_override": "the same for each override",
    "intercept/dispatch.py:forward": "what autograd calls to record what has been computed",
    "intercept/dispatch.py:backward": "what autograd calls for a gradient; it only calls attempt",
    "intercept/identity.py:forget": "what Python calls as an object goes; it takes an entry out",
    "intercept/objects.py:_named_tensors": "a generator, which Python enters as it closes it",
    "knobs/gradients/on_demand.py:set_stored": "forgets a deferred gradient as the program sets it",
    "knobs/gradients/on_demand.py:delete_stored": "the same as it deletes one",
    "knobs/gradients/on_demand.py:_forget_deferred": "the same",
    "knobs/gradients/on_demand.py:_get_computed": "returns a gradient, or raises the error without "
    "one",
    "knobs/gradients/kept.py:_pack": "is called by torch while it hands a saved tensor over",
    "knobs/precision/scout.py:__torch_function__": "the same of what torch calls for a function",
}
"""Files and functions above which there is nothing of ours, and why."""

FEWEST = {"agent/": 40, "intercept/": 100, "knobs/": 230}
"""Functions that are reached: fewer would mean that something is not tried any more."""


ENTRIES = (
    pytest.param("1", marks=pytest.mark.long),
    pytest.param("2,7", marks=pytest.mark.injected),
)


def run(entries: str, words: tuple[str, ...]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("injection.py")), entries, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=ENTRIES)
def outcomes(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Of all runs; the first is that of the bare program."""
    words = ("=", *SETTINGS)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, [request.param] * 2, (words[::2], words[1::2]))
    bare, of_second = first[0], second[0]
    assert bare["said"] == of_second["said"]
    assert bare["weights"] == of_second["weights"]
    return [*first, *second[1:]]


def injected(outcomes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for outcome in outcomes:
        if outcome["place"] is not None:
            file, name, _ = outcome["place"]
            if file not in BORDERS and f"{file}:{name}" not in BORDERS:
                yield outcome


def fault(outcome: dict[str, Any], bare: dict[str, Any]) -> str | None:
    """What the program has noticed."""
    if "status" in outcome:
        return f"the process ended with {outcome['status']}"
    if outcome["error"] or outcome["stderr"]:
        return str(outcome["error"] or outcome["stderr"])
    said, expected = outcome["said"], bare["said"]
    if said[-1] != expected[-1] or [what for what, _ in said] != [what for what, _ in expected]:
        return f"{said[-1]}, not {expected[-1]}"
    (name, setting), *_ = outcome["settings"].items()
    place = outcome["place"]
    is_the_agents = place is not None and not place[0].startswith("knobs/")
    if is_the_agents or knobs.is_bitwise(name, setting):
        if (said, outcome["weights"]) != (expected, bare["weights"]):
            return "other weights"
    elif not outcome["finite"]:
        return "weights that are not finite"
    return None


def test_the_program_is_as_without_us(outcomes: list[dict[str, Any]]) -> None:
    bare = outcomes[0]
    assert bare["error"] is None
    faults = [
        f"{outcome['settings']} {outcome['place']} entry {outcome['entries']}: {why}"
        for outcome in (*(o for o in outcomes[1:] if o["place"] is None), *injected(outcomes))
        if (why := fault(outcome, bare)) is not None
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("outcomes", ENTRIES[:1], indirect=True)
def test_the_functions_of_ours_that_are_reached_do_not_become_fewer(
    outcomes: list[dict[str, Any]],
) -> None:
    functions = {tuple(outcome["place"]) for outcome in injected(outcomes)}
    counts = {folder: sum(place[0].startswith(folder) for place in functions) for folder in FEWEST}
    print("functions of ours that were made to fail:", counts)
    assert all(counts[folder] >= fewest for folder, fewest in FEWEST.items()), counts
