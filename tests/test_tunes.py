"""``benchmarks/tunes.py``: what it makes of what it has measured, and what it measures again."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from benchmarks import outside, tunes
from flatout.tune.statistics import estimate_ratio
from flatout.wire.ratios import Ratio

PLAN = 'version = 1\n\n[plan]\noptimizer = "onepass"\n'

NAMES = ["image", "language", "speech", "dcgan"]


def tuned(value: float, seconds: float = 250.0) -> dict[str, Any]:
    claim = {"value": value, "low": value / 1.02, "high": value * 1.02, "pairs": 6}
    settings = {"optimizer": "onepass"}
    return {"seconds": seconds, "settings": settings, "why": "", "claimed": claim, "plan": PLAN}


def no_plan(seconds: float) -> dict[str, Any]:
    why = "no setting is faster"
    return {"seconds": seconds, "settings": {}, "why": why, "claimed": None, "plan": None}


def pair(bare_s: float, plan_s: float) -> dict[str, Any]:
    return {"bare": {"step_s": bare_s, "said": []}, "plan": {"step_s": plan_s, "said": []}}


def measured(path: Path, name: str, claim: float, factor: float, bare_s: float = 0.1) -> None:
    """A tune that claims, and pairs with another ratio, give or take a percent."""
    results = outside.Results(path)
    results.add(name, "tune", **tuned(claim))
    for noise in (0.99, 1.01, 1.0, 1.005, 0.995):
        results.add(name, "pair", **pair(bare_s, bare_s / factor * noise))


def test_the_quotient_of_two_ratios_has_both_their_uncertainties() -> None:
    one = Ratio(2.0, 2.0 / 1.03, 2.0 * 1.03, 8)
    other = Ratio(1.6, 1.6 / 1.04, 1.6 * 1.04, 8)
    value, low, high = tunes.quotient(one, other)
    half = math.hypot(math.log(1.03), math.log(1.04))
    assert value == pytest.approx(1.25)
    assert (low, high) == (
        pytest.approx(1.25 * math.exp(-half)),
        pytest.approx(1.25 * math.exp(half)),
    )
    backwards = tunes.quotient(other, one)
    assert backwards == pytest.approx((1 / value, 1 / high, 1 / low))


def test_bounds_that_lie_askew_go_to_their_own_sides() -> None:
    exact = Ratio(1.0, 1.0, 1.0, 0)
    askew = Ratio(1.0, 0.98, 1.10, 8)
    assert tunes.quotient(askew, exact) == pytest.approx((1.0, 0.98, 1.10))
    assert tunes.quotient(exact, askew) == pytest.approx((1.0, 1 / 1.10, 1 / 0.98))


TICKING = """
import sys, time
log = open(sys.argv[1], "a")
for step in range(0, 60, 10):
    print(f"step {step} loss 0.5", flush=True)
    for _ in range(20):
        sum(range(20_000))
        log.write(f"{sys.argv[2]}\\n"); log.flush()
"""


def test_two_programs_take_turns_from_line_to_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    commands = {name: [sys.executable, "-c", TICKING, str(log), name] for name in ("a", "b")}
    monkeypatch.setattr(outside, "TURN_SECONDS", 0.0)
    found = outside.timed(commands, tmp_path)
    for name in commands:
        turns = found[name]["turns"]
        assert [steps for steps, _ in turns] == [10] * 4  # the first two lines warm up
        assert found[name]["step_s"] == pytest.approx(sum(s for _, s in turns) / 40, rel=1e-3)
    blocks = [name for name, _ in groupby(log.read_text().split())]
    # a warms up, b does; a b, b a, ...: whoever is second in a round is the first of the next.
    assert blocks[:5] == ["a", "b", "a", "b", "a"]


def test_a_program_that_fails_or_says_too_little_is_not_timed(tmp_path: Path) -> None:
    ticking = [sys.executable, "-c", TICKING, str(tmp_path / "log"), "a"]
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        outside.timed({"bare": ticking, "plan": failing}, tmp_path)
    with pytest.raises(ValueError, match="too few lines"):
        outside.timed({"bare": [sys.executable, "-c", "print('step 1 loss 2')"]}, tmp_path)


def test_only_what_is_missing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    results = outside.Results(path)
    results.add("dcgan", "tune", **tuned(2.0))
    results.add("dcgan", "pair", **pair(0.2, 0.1))
    results.add("image", "pair", **pair(0.2, 0.1))  # another shard's
    with path.open("a") as file:
        file.write('{"program": "dcgan", "kind": "pa')  # killed as it wrote
    started: list[list[str]] = []

    def timed(commands: dict[str, list[str]], folder: Path) -> dict[str, Any]:
        for command in commands.values():
            if "flatout" in command:
                assert Path(command[command.index("--plan") + 1]).read_text() == PLAN
            started.append(command)
        return pair(0.2, 0.1)

    monkeypatch.setattr(tunes, "timed", timed)
    results = outside.Results(path)
    tunes.measure("dcgan", ["python", "x.py"], 40, 3, "5m", results)
    sides = ["plan" if "flatout" in command else "bare" for command in started]
    assert sides == ["plan", "bare", "bare", "plan"]  # pairs 1 and 2
    assert [command[-2:] for command in started] == [["--seed", "1"]] * 2 + [["--seed", "2"]] * 2
    assert all(command[-5:-2] == ["x.py", "--steps", "40"] for command in started)
    assert len(outside.Results(path).of("dcgan", "pair")) == 3
    tunes.measure("dcgan", ["python", "x.py"], 40, 3, "5m", outside.Results(path))
    assert len(started) == 4


def test_all_as_asked(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for name in NAMES:
        measured(path, name, 2.0, 2.0)
    outside.Results(path).add("jpeg", "tune", **no_plan(200))
    lines, is_as_asked = tunes.summary([*NAMES, "jpeg"], outside.Results(path))
    assert is_as_asked, lines
    assert len(lines) == 1 + 2 * 5
    assert "no plan" in lines[-2]
    assert "no setting is faster" in lines[-1]


def test_a_tune_may_take_as_long_as_600_bare_steps(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    measured(path, "image", 2.0, 2.0, bare_s=1.0)
    results = outside.Results(path)
    results.add("image", "tune", **tuned(2.0, seconds=599))
    results.add("jpeg", "tune", **no_plan(599))
    results.add("jpeg", "bare", step_s=1.0)
    assert tunes.summary(["image", "jpeg"], results)[1]
    results.add("image", "tune", **tuned(2.0, seconds=601))
    lines, is_as_asked = tunes.summary(["image", "jpeg"], results)
    assert not is_as_asked
    assert "MISSED image: tuned for 601 s, allowed: 600 s" in lines


@pytest.mark.parametrize(
    ("name", "claim", "factor", "missed"),
    [
        ("dcgan", 1.4, 1.4, "MISSED dcgan: asked: 1.5x"),
        ("image", 1.0, 0.95, "MISSED image: may be slower than bare"),
        ("language", 1.2, None, "MISSED language: not measured to its end"),
    ],
)
def test_what_is_missed_is_said(
    tmp_path: Path, name: str, claim: float, factor: float | None, missed: str
) -> None:
    path = tmp_path / "results.jsonl"
    if factor is None:
        outside.Results(path).add(name, "tune", **tuned(claim))
    else:
        measured(path, name, claim, factor)
    lines, is_as_asked = tunes.summary([name], outside.Results(path))
    assert not is_as_asked
    assert any(line.startswith(missed) for line in lines)


def test_one_ratio_of_all_may_disagree(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for name in NAMES[:3]:
        measured(path, name, 2.0, 2.0 if name != "speech" else 1.7)
    lines, is_as_asked = tunes.summary(NAMES[:3], outside.Results(path))
    assert is_as_asked
    assert "claimed and independent ratio disagree for speech" in lines
    measured(path, "dcgan", 2.0, 1.7)
    lines, is_as_asked = tunes.summary(NAMES, outside.Results(path))
    assert not is_as_asked
    assert "MISSED claimed and independent ratio disagree: speech, dcgan" in lines


def test_a_quotient_that_is_not_known_well_enough_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = outside.Results(path)
    results.add("image", "tune", **tuned(2.0))
    for plan_s in (0.09, 0.1, 0.11, 0.12, 0.1):
        results.add("image", "pair", **pair(0.2, plan_s))
    ratio = estimate_ratio([math.log(0.2 / plan_s) for plan_s in (0.09, 0.1, 0.11, 0.12, 0.1)])
    verdict = tunes.judge("image", results)
    assert verdict.independent == ratio
    lines, is_as_asked = tunes.summary(["image"], results)
    assert not is_as_asked
    assert any("MISSED image: the quotient is known to" in line for line in lines)


def test_the_file_is_one_line_of_json_for_each_measurement(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    measured(path, "image", 2.0, 2.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["tune", *["pair"] * 5]
    assert {line["program"] for line in lines} == {"image"}
