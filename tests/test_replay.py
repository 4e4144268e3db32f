"""The decisions of a tune on recorded step times; ``benchmarks/replay.py`` does it at length."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from scipy import stats

FILE = Path(__file__).parent.parent / "benchmarks" / "replay.py"
REPLAYS = 100


@pytest.fixture(scope="module")
def replay() -> ModuleType:
    specification = importlib.util.spec_from_file_location("replay", FILE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["replay"] = module  # its dataclasses look their module up
    specification.loader.exec_module(module)
    return module


def outcomes(replay: ModuleType, title: str, replays: int) -> list[object]:
    """Some replays of each program, ``replays`` in all."""
    names = sorted(replay.recorded_programs())
    parts = [
        replay.replay(name, replay.SCENARIOS[title], range(number, replays, len(names)))
        for number, name in enumerate(names)
    ]
    return [outcome for part in parts for outcome in part]


def test_no_gain_is_claimed_where_there_is_none(replay: ModuleType) -> None:
    """With a true rate of 6.5 %, more claims than this come once in a thousand times."""
    claims = sum(outcome.is_claimed for outcome in outcomes(replay, "dummies", REPLAYS))
    assert claims <= stats.binom.ppf(0.999, REPLAYS, 0.065)


def test_what_is_slower_is_not_claimed(replay: ModuleType) -> None:
    claims = sum(outcome.is_claimed for outcome in outcomes(replay, "3 % slower", 40))
    assert claims <= stats.binom.ppf(0.999, 40, 0.065)


def test_a_large_gain_is_found_among_twenty_dummies(replay: ModuleType) -> None:
    found = outcomes(replay, "20 % gain", 40)
    assert all("real0" in outcome.settings for outcome in found)
    claims = sum(outcome.is_claimed and outcome.ratio.pairs <= 30 for outcome in found)
    assert claims >= stats.binom.ppf(0.001, 40, 0.9)
