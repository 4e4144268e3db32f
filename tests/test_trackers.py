"""Trials tell no tracker; ``flatout run`` leaves the trackers to the user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flatout import launch
from flatout.launch import trackers
from flatout.wire.request import Request

SHOW = """
import os
print(*(f"{name}={value}" for name, value in os.environ.items()), sep="\\n")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATOUT_HOME", str(tmp_path / "home"))
    for switch in trackers.SWITCHES:
        monkeypatch.delenv(switch.variable, raising=False)
    monkeypatch.setenv("NEPTUNE_MODE", "debug")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123456789abcdef")
    path = tmp_path / "show.py"
    path.write_text(SHOW)
    return path


def test_a_trial_is_offline_and_what_is_stricter_stays(script: Path) -> None:
    finished = launch.start([sys.executable, str(script)], Request(), output="capture")
    assert finished.output is not None
    seen = dict(line.split("=", 1) for line in finished.output.splitlines() if "=" in line)
    assert seen["WANDB_MODE"] == "offline"
    assert seen["CLEARML_OFFLINE_MODE"] == "1"
    assert (seen["COMET_START_ONLINE"], seen["COMET_AUTO_LOG_DISABLE"]) == ("0", "1")
    assert seen["NEPTUNE_MODE"] == "debug"
    assert "MLFLOW_TRACKING_URI" not in seen
    assert "MLFLOW_RUN_ID" not in seen
    assert "HF_HUB_OFFLINE" not in seen  # a program may have to download its model


def test_a_real_run_is_not(script: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-m", "flatout", "run", "--", sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ,
    )
    seen = completed.stdout.splitlines()
    assert "WANDB_MODE=online" in seen
    assert "MLFLOW_TRACKING_URI=https://mlflow.example.org" in seen
    assert not any(line.startswith("CLEARML_OFFLINE_MODE") for line in seen)


@pytest.mark.parametrize(
    ("uri", "stays"),
    [
        ("./mlruns", True),
        ("/data/mlruns", True),
        ("file:///data/mlruns", True),
        ("sqlite:///mlflow.db", True),
        ("https://mlflow.example.org", False),
        ("postgresql://user@host/mlflow", False),
        ("databricks", False),
        ("databricks://profile", False),
    ],
)
def test_mlflow_keeps_a_store_on_this_machine(uri: str, stays: bool) -> None:
    names = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_ID": "7"}
    kept = names if stays else {}
    changed = trackers.offline(names)
    assert {name: changed[name] for name in names if name in changed} == kept
