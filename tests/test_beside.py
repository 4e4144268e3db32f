"""Claims beside other work, on made-up blocks; ``benchmarks/beside.py`` replays recorded ones."""

from __future__ import annotations

import random

import pytest

from benchmarks import beside, record_beside
from benchmarks.beside import Recorded, Tally
from flatout.tune.quiet import Block
from flatout.wire.disturbance import Stretch

BURSTS = 6
"""Blocks of a burst, and of the pause after it."""


def recorded(settings: dict[str, str], gain: float, beside_gain: float, busy: bool) -> Recorded:
    """A pair of runs: quiet blocks, and others beside bursts or beside work that never stops.

    Args:
        settings: of the variant.
        gain: what they gain while it is quiet.
        beside_gain: what they gain in a block that is disturbed.
        busy: whether the other work never stops.
    """
    draw = random.Random(0)
    blocks, work = [], []
    for number in range(240):
        is_quiet = number < 120
        is_disturbed = not is_quiet and (busy or number // BURSTS % 2 == 0)
        slow = draw.uniform(2, 9) if is_disturbed else 1.0
        ratio = (beside_gain if is_disturbed else gain) * draw.gauss(1, 0.03)
        stretches = [
            Stretch(0.5, draw.uniform(0.1, 0.9)) if is_disturbed else Stretch(0.02, 0.005)
            for _ in range(2)
        ]
        blocks.append(Block((number, number + 1), 0.1 * slow, 0.1 * slow / ratio, *stretches))
        work.append("quiet" if is_quiet else "bursts")
    return Recorded(settings, blocks, work)


def tally(pair: Recorded, work: str, replays: int = 40) -> Tally:
    return Tally.of(pair, beside.replay(pair, work, range(replays)))


@pytest.mark.parametrize("settings", [{"threads": "one"}, {"precision": "bf16"}])
def test_beside_work_that_never_stops_nothing_is_claimed(settings: dict[str, str]) -> None:
    assert tally(recorded(settings, 0.55, 5.0, busy=True), "bursts").measured == 0


@pytest.mark.parametrize("settings", [{"threads": "one"}, {"precision": "bf16"}])
def test_beside_bursts_the_quiet_truth_is_found(settings: dict[str, str]) -> None:
    slower = tally(recorded(settings, 0.55, 5.0, busy=False), "bursts")
    assert slower.gains == 0
    assert slower.measured > 20
    faster = tally(recorded(settings, 1.3, 0.8, busy=False), "bursts")
    assert faster.gains == faster.measured > 20
    assert faster.holds > 0.85 * faster.measured


def test_of_the_same_settings_hardly_any_gain_is_claimed() -> None:
    same = tally(recorded({}, 1.0, 1.0, busy=False), "mixed", replays=100)
    assert same.measured > 80
    assert same.gains <= 6  # of 2 %, more come once in a hundred times


def test_readings_are_packed_without_loss() -> None:
    values = [1.0, 1.25, 1.25, 9.00001]
    assert beside._unpacked(record_beside.pack(values), 4) == values
    assert beside._unpacked(record_beside.pack([None] * 3), 3) == [None] * 3
    assert beside._unpacked(record_beside.pack([2, 2, 1]), 3) == [2, 2, 1]
    assert beside._unpacked(record_beside.pack([None, 80.5]), 2) == [None, 80.5]


@pytest.mark.parametrize("name", beside.recorded_programs())
def test_of_recorded_pairs_nothing_false_is_claimed(name: str) -> None:
    """Beside all that was recorded, as it came."""
    pairs = beside.load(name)
    same = tally(pairs["same"], "mixed", replays=30)
    assert same.gains <= 3
    threads = pairs["threads"]
    assert tally(threads, "mixed", replays=30).gains == 0 or threads.truth > 1
    assert tally(threads, "steady", replays=10).measured == 0
