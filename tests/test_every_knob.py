"""What every setting of every knob promises, on a program that it can act on: exactness, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flatout import kernels, knobs
from flatout.wire.record import read_run
from flatout.wire.request import Request
from tests.exercises import EXERCISES, STEPS

ELSEWHERE = {"flash", "cudnn", "efficient", "reduce-overhead"}
"""Settings for CUDA of knobs that are for the CPU as well."""

TESTED_ALONE = {"regional", "dynamic", "max-autotune"}
"""Compiling takes long: one way of it is enough here."""

ALL = [
    (name, setting)
    for name, knob in knobs.registry().items()
    for setting in knob.settings
    if "cpu" in knob.platforms and setting not in ELSEWHERE | TESTED_ALONE
]

Train = Callable[..., tuple[dict[str, Any], list[str]]]


def process(environment: dict[str, str]) -> subprocess.Popen[str]:
    """What trains, see ``exercises.py``."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.exercises"],
        env=environment,
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """Trains the exercise of a knob, from a checkpoint or from the start.

    Args: the knob, its setting (``None``: bare), the checkpoint. Returns: what the program saves,
    and the knobs that did not apply.
    """
    root = tmp_path_factory.mktemp("exercises")
    plain = {**os.environ, "OMP_NUM_THREADS": "1"}
    forking = process(plain)

    def train(
        knob: str, setting: str | None, resumed: Path | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        folder = root / str(len(list(root.iterdir())))
        folder.mkdir()
        request = Request(settings={} if setting is None else {knob: setting})
        variables = knobs.prepare(request, plain)
        job = {
            "knob": knob,
            "settings": dict(request.settings),
            "folder": str(folder),
            "resumed": None if resumed is None else str(resumed),
            "starts_anew": bool(variables),
        }
        trains = process({**plain, **variables}) if variables else forking
        assert trains.stdin is not None
        assert trains.stdout is not None
        trains.stdin.write(json.dumps(job) + "\n")
        trains.stdin.flush()
        said = json.loads(trains.stdout.readline())
        if variables:
            trains.communicate(timeout=60)
        assert not said, said
        recorded = read_run(folder).main
        assert recorded is not None
        failed = [event for event in recorded.events if event.what == "failed"]
        assert not failed, failed[0].traceback
        saved = torch.load(folder / "saved.pt")
        saved["path"] = folder / "saved.pt"
        assert len(recorded.steps) >= STEPS
        return saved, [event.subject for event in recorded.events if event.what == "skipped"]

    yield train
    forking.communicate(timeout=60)


@pytest.fixture(scope="module")
def bare(train: Train) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Of a knob's exercise, the checkpoint that bare saves, and what it saves when it goes on."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}

    def bare(knob: str) -> tuple[Path, dict[str, Any]]:
        exercise = type(EXERCISES[knob]).__name__
        if exercise not in found:
            first = train(knob, None)[0]["path"]
            found[exercise] = first, train(knob, None, first)[0]
        return found[exercise]

    return bare


def layout(state: Any) -> Any:
    """Keys, dtypes and shapes of what was saved; numbers have none."""
    if isinstance(state, dict):
        return {key: layout(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [layout(value) for value in state]
    if isinstance(state, torch.Tensor):
        return state.dtype, tuple(state.shape)
    return None if isinstance(state, (float, Path)) else state


def test_each_knob_names_its_exercise() -> None:
    assert {name for name, _ in ALL} == EXERCISES.keys()


@pytest.mark.parametrize(("name", "setting"), ALL)
def test_a_setting_keeps_its_promises(train: Train, bare: Any, name: str, setting: str) -> None:
    knob = knobs.get(name)
    if knob.kernels and kernels.find_compiler() is None:
        pytest.skip("there is no compiler")
    checkpoint, of_bare = bare(name)
    of_knob, skipped = train(name, setting, checkpoint)
    if name in skipped and not of_knob["engaged"]:
        pytest.skip(f"{name}={setting} does not apply here")
    assert of_knob.pop("engaged") or not knob.waits_for_calls
    assert layout(of_knob) == layout({key: of_bare[key] for key in of_knob})
    if knobs.is_bitwise(name, setting):
        assert of_knob["losses"] == of_bare["losses"]
        assert torch.equal(of_knob["rng"], of_bare["rng"])
        for key, weights in of_bare["net"].items():
            assert torch.equal(of_knob["net"][key], weights), key
    assert of_knob["losses"][-1] == pytest.approx(of_bare["losses"][-1], abs=0.25)

    goes_on, _ = train(name, None, of_knob["path"])
    assert layout({key: goes_on[key] for key in of_knob}) == layout(of_knob)
    assert goes_on["losses"][-1] < of_knob["losses"][0]
