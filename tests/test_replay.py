"""The decisions of a tune on recorded step times; ``benchmarks/replay.py`` does it at length."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

FILE = Path(__file__).parent.parent / "benchmarks" / "replay.py"


@pytest.fixture(scope="module")
def replay() -> Any:
    specification = importlib.util.spec_from_file_location("replay", FILE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["replay"] = module  # its dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def outcomes(replay: Any, title: str, names: list[str], replays: int) -> list[Any]:
    """Some replays of each program, ``replays`` in all."""
    parts = [
        replay.replay(name, replay.SCENARIOS[title], range(number, replays, len(names)))
        for number, name in enumerate(names)
    ]
    return [outcome for part in parts for outcome in part]


def test_no_gain_is_claimed_where_there_is_none(replay: Any) -> None:
    """With a true rate of 6.5 %, more claims than this come once in a thousand times."""
    found = outcomes(replay, "dummies", replay.recorded_programs(), 60)
    assert len(found) == 60
    claims = sum(outcome.is_claimed for outcome in found)
    assert claims <= stats.binom.ppf(0.999, 60, 0.065)


def test_a_gain_is_found_among_twenty_dummies(replay: Any) -> None:
    found = outcomes(replay, "20 % gain", ["gan", "language"], 16)
    assert all("real0" in outcome.settings for outcome in found)
    claims = sum(outcome.is_claimed and outcome.ratio.pairs <= 30 for outcome in found)
    assert claims >= stats.binom.ppf(0.001, 16, 0.9)
    found = outcomes(replay, "5 % gain", ["gan", "language"], 24)
    assert sum(outcome.is_claimed for outcome in found) >= stats.binom.ppf(0.001, 24, 0.9)
