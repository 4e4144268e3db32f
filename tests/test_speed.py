"""``flatout verify --speed``: what it costs, what it concludes, and one real measurement."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_memory import STEP

from flatout.errors import UserError
from flatout.tune import bare, speed
from flatout.tune.pairs import Pace
from flatout.tune.speed import Comparison
from flatout.tune.trial import Trial
from flatout.wire.header import Header
from flatout.wire.ratios import Ratio
from flatout.wire.record import ProcessRecord
from tests.test_today import EVIDENCE

CLAIMED = Ratio(1.5, 1.4, 1.6, 8)


@pytest.mark.parametrize(
    ("now", "holds", "said"),
    [
        (Ratio(1.48, 1.35, 1.62, 5), True, "the claim holds"),
        (Ratio(1.9, 1.8, 2.0, 5), True, "the claim holds"),
        (Ratio(1.3, 1.2, 1.41, 5), True, "the claim holds"),
        (Ratio(1.2, 1.1, 1.3, 5), False, "today the plan gains less than was claimed"),
        (Ratio(0.9, 0.8, 0.99, 5), False, "today the plan is slower than the bare program"),
        (Ratio(1.3, 0.9, 1.9, 5), False, "not decided"),
    ],
)
def test_the_speed_of_today_is_judged_by_the_claim(now: Ratio, holds: bool, said: str) -> None:
    found = Comparison(CLAIMED, now)
    assert found.holds == holds
    assert found.lines[0] == f"speed: claimed {CLAIMED}, measured now {now}"
    assert found.lines[1].startswith(said)


def test_beside_other_work_nothing_is_concluded() -> None:
    why = "not measurable now: 0 of 5 pairs were quiet enough, and others took 60% of the CPUs"
    for at_least in (None, 1.1):
        found = Comparison(CLAIMED, Ratio(1.5, 1.4, 1.6, 5), at_least, why)
        assert not found.holds
        assert found.lines == (f"speed: claimed {CLAIMED}", why)


@pytest.mark.parametrize(
    ("now", "at_least", "holds"),
    [
        (Ratio(1.3, 1.2, 1.4, 5), 1.2, True),  # less than claimed, and all that is asked for
        (Ratio(1.5, 1.4, 1.6, 5), 1.45, False),
        (Ratio(0.97, 0.95, 0.99, 5), 0.9, True),
    ],
)
def test_what_the_user_asks_for_takes_the_place_of_the_claim(
    now: Ratio, at_least: float, holds: bool
) -> None:
    found = Comparison(CLAIMED, now, at_least)
    assert found.holds == holds
    assert ("is not shown" in found.lines[1]) != holds


def test_without_a_claim_a_gain_is_asked_for() -> None:
    gain, none = Ratio(1.2, 1.1, 1.3, 5), Ratio(1.05, 0.98, 1.12, 5)
    assert Comparison(None, gain).holds
    assert not Comparison(None, none).holds
    assert "nothing was claimed" in Comparison(None, gain).lines[0]


@pytest.mark.parametrize("step_s", [0.0003, 0.01, 0.1, 0.3])
@pytest.mark.parametrize("outside_s", [1.0, 3.0])
def test_all_pairs_fit_into_a_minute_where_steps_are_short(step_s: float, outside_s: float) -> None:
    pace = Pace(outside_s, step_s)
    steps = speed.choose_steps(pace, 5, 50.0)
    assert 8 <= steps <= 2000
    if steps > 8:
        assert speed.estimate_s(pace, 5, steps) <= 50.0 + 1e-9


def test_the_cost_that_is_announced_grows_with_what_is_asked_for() -> None:
    slow = replace(EVIDENCE, bare_step_ms=6000.0, plan_step_ms=2400.0)
    assert speed.estimate_before_s(None, 5, None) == 60
    assert speed.estimate_before_s(EVIDENCE, 5, None) == pytest.approx(64.56)
    assert speed.estimate_before_s(slow, 5, None) == pytest.approx(386)
    assert speed.estimate_before_s(EVIDENCE, 5, 400) > 700


def test_a_short_job_is_measured_whole() -> None:
    assert speed.choose_steps(Pace(1.0, 0.001), 5, 50.0, job_steps=47) == 47


def first_run(*step_ms: float, seconds: float = 10.0) -> Trial:
    steps = [replace(STEP, step_ms=ms) for ms in step_ms]
    return Trial(ProcessRecord(Path(), Header(), steps=steps), seconds, ended=False)


def test_the_pace_is_that_of_the_steps_after_the_warm_up() -> None:
    pace = bare.find_pace(first_run(2000.0, 900.0, 100.0, 500.0, 500.0))
    assert (pace.step_s, pace.outside_steps_s) == (0.5, 6.0)
    assert bare.find_pace(first_run(9000.0, 8000.0, seconds=20.0)).step_s == 8.5


def test_a_program_without_a_step_has_no_pace() -> None:
    with pytest.raises(UserError, match="no step"):
        bare.find_pace(first_run())


TRAIN = """
import torch
net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
optimizer = torch.optim.Adam(net.parameters())
for _ in range(10_000):
    loss = net(torch.randn(8, 64)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def verify(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flatout", "verify", *words, "--", sys.executable, "train.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_measurement_that_begins_anew_cannot_be_continued(tmp_path: Path) -> None:
    (tmp_path / "flatout.toml").write_text('[plan]\noptimizer = "onepass"\n')
    done = verify(tmp_path, "--speed", "--resume")
    assert done.returncode == 2
    assert "leave out --resume" in done.stderr


@pytest.mark.tunes
def test_the_speed_is_measured_again(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    plan = '[plan]\noptimizer = "onepass"\n'
    (tmp_path / "flatout.toml").write_text(plan)
    words = ("--speed", "--steps", "100", "--seeds", "3", "--quiet", "--at-least")
    done = verify(tmp_path, *words, "0.01")
    assert done.returncode == 0, done.stderr
    assert "measuring the speed of flatout.toml again takes about a minute" in done.stderr
    assert re.search(r"nothing was claimed, measured now \d\.\d\dx \(.* 3 pairs\)", done.stderr)
    assert (tmp_path / "flatout.toml").read_text() == plan
    assert verify(tmp_path, *words, "50").returncode == 1
