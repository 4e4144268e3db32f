"""Figures that are printed side by side agree: what a reader reckons of them is what is printed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flatout.plan import Evidence
from flatout.report import words
from flatout.tune import formatting, memory, pairs, result
from flatout.tune.document import PARTS, Document
from flatout.tune.ledger import Outcome
from flatout.tune.pairs import Pairs
from flatout.tune.proof import Verdict
from flatout.tune.trial import Trial
from flatout.wire.header import Header
from flatout.wire.lines import Captured
from flatout.wire.ratios import Ratio
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.turns import PHASES

MIB = 2**20
SIDES = ("bare", "plan")

STEP = Step(
    index=0,
    at_s=0.0,
    step_ms=1.0,
    phases_ms=dict.fromkeys(PHASES),
    losses=(),
    forwards=1,
    backwards=1,
    updates=1,
    minor_faults=None,
    major_faults=None,
    peak_rss_bytes=None,
    peak_device_bytes=None,
    arm=None,
    mark=None,
    grad=True,
)

A_RUN = st.tuples(
    st.floats(0.004, 20_000),  # step in ms
    st.lists(st.floats(0.5, 3), min_size=20, max_size=24),  # what each step takes more
    st.lists(st.floats(0, 30), max_size=3),  # evaluation passes, in steps
    st.floats(0.5, 200),  # start-up in s
    st.floats(30 * MIB, 30_000 * MIB),  # memory
)


def trial(run: tuple[float, list[float], list[float], float, float]) -> Trial:
    step_ms, factors, passes, startup_s, peak = run
    process = ProcessRecord(Path("record"), Header())
    at_s = startup_s
    for number, factor in enumerate(factors):
        ms = step_ms * factor
        phases: dict[str, float | None] = {**STEP.phases_ms, "forward": ms / 4, "other": 3 * ms / 4}
        process.steps.append(
            dataclasses.replace(
                STEP, at_s=at_s, step_ms=ms, phases_ms=phases, peak_rss_bytes=round(peak)
            )
        )
        at_s += ms / 1e3
        if number >= 10 and passes and number - 10 < len(passes):
            ms = step_ms * passes[number - 10]
            process.evaluations.append(dataclasses.replace(STEP, at_s=at_s, step_ms=ms))
            at_s += ms / 1e3
    return Trial(process, at_s, False)


def outcome(runs: list[tuple[Trial, Trial]]) -> Outcome:
    made = Pairs({}, {"gc": "seldom"}, [one for one, _ in runs], [other for _, other in runs])
    evidence = Evidence({"gc": "seldom"}, 1.0, 1.0, 1.0, 2, 1.0, 1.0, 20, 2, True, "bitwise")
    return Outcome(
        settings={"gc": "seldom"},
        evidence=evidence,
        pairs=made,
        verdict=Verdict(True, "", "bitwise", 20, True, ()),
        job_steps=1000,
    )


def number(text: str, units: dict[str, float]) -> tuple[float, float]:
    """What a printed figure says, and half a unit of its last digit."""
    digits, unit = text.rsplit(" ", 1)
    digits = digits.replace(",", "")
    _, _, decimals = digits.partition(".")
    last = 10.0 ** -len(decimals)
    if not decimals and "e" not in digits and float(digits) >= 1000 and unit in ("ms", "us", "s"):
        last = 1.0
    return float(digits) * units[unit], last / 2 * units[unit]


def rows(lines: list[str]) -> dict[str, list[str]]:
    """The table of both sides: name, bare, plan, change."""
    return {
        cells[0]: cells[1:] for line in lines if len(cells := re.split(r" {2,}", line.strip())) > 2
    }


TIMES = {"us": 1e-3, "ms": 1.0, "s": 1e3}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(A_RUN, A_RUN), min_size=2, max_size=4))
def test_a_report_can_be_reckoned_again(runs: list[tuple[object, object]]) -> None:
    found = outcome([(trial(one), trial(other)) for one, other in runs])  # type: ignore[arg-type]
    assert found.pairs is not None
    document = result.make_document(("python", "x.py"), Path("plan.toml"), found)
    said = words.lines(document)
    claim = document.claim
    assert claim is not None
    bare, plan = document.baseline, document.with_plan
    assert plan is not None

    # The ratio is that of the step times, and its pairs sum up to it.
    assert bare.step_ms / plan.step_ms == pytest.approx(claim.value)  # type: ignore[operator]
    each = [one / other for one, other in found.pairs.times_ms]
    assert min(each) * (1 - 1e-9) <= claim.value <= max(each) * (1 + 1e-9)
    line = next(line for line in said if "pairs of fresh processes" in line)
    match = re.match(
        r"(.+): ([\d.]+)x \(([\d.]+) to ([\d.]+) .*, (.+) a step bare, (.+) with the", line
    )
    assert match is not None
    verdict, value, low, high = match[1], *map(float, match.group(2, 3, 4))
    assert (verdict == "faster") == (claim.low > 1)
    assert (verdict == "slower") == (claim.high < 1)
    assert verdict != "faster" or low >= 1
    assert verdict != "slower" or high <= 1
    (bare_ms, bare_half), (plan_ms, plan_half) = (number(match[n], TIMES) for n in (5, 6))
    least = (bare_ms - bare_half) / (plan_ms + plan_half)
    most = (bare_ms + bare_half) / max(plan_ms - plan_half, 1e-12)
    assert least - 0.0051 <= value <= most + 0.0051

    # The table: each change is the one of the figures beside it.
    table = rows(said)
    assert table["step"][:2] == [match[5], match[6]]
    for name in ("step", "peak memory"):
        units = TIMES if name == "step" else {"MiB": 1.0, "GiB": 1024.0}
        (one, _), (other, _) = (number(text, units) for text in table[name][:2])
        assert float(table[name][2].rstrip("%")) == pytest.approx(100 * (other / one - 1), abs=0.51)
    for name in ("start-up", "compilation, first steps"):
        if all(text.count(" ") == 1 for text in table[name][:2]):
            one, other = (float(text.split()[0]) for text in table[name][:2])
            assert table[name][2].lstrip("+") == f"{other - one:.1f} s".replace("-0.0", "0.0")

    # The phases are the step.
    for side in (bare, plan):
        parts = [side.phases_ms.get(part) for part in PARTS]
        assert sum(ms for ms in parts if ms is not None) == pytest.approx(side.step_ms)

    # What the gate says of memory is what the table says.
    steps = [
        found.pairs.steps(side) for side in (found.pairs.baseline_runs, found.pairs.variant_runs)
    ]
    refusal = memory.refusal(*steps, allowed=0.0005)
    assert refusal is not None
    assert f"({table['peak memory'][1]} against {table['peak memory'][0]};" in refusal


def test_the_line_of_a_pair_is_what_is_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stood still once in a while is slower by its mean, and faster by its steps."""
    steady = trial((10.0, [1.0] * 40, [], 1.0, 1e8))
    stalled = (
        trial((9.8, [60.0 if n == place else 1.0 for n in range(40)], [], 1.0, 1e8))
        for place in (20, 25, 30)
    )
    said: list[str] = []
    monkeypatch.setattr(
        pairs, "run_once", lambda _, settings, **kwargs: next(stalled) if settings else steady
    )
    made = Pairs({}, {"gc": "seldom"})
    pairs.run(
        None,  # type: ignore[arg-type]
        made,
        pace=pairs.Pace(1.0, 0.01),
        steps=40,
        seed=0,
        is_enough=lambda made: made.count >= 3,
        print_line=said.append,
    )
    assert said == [f"pair {n}: 10 ms, 9.8 ms, 1.02x" for n in (1, 2, 3)]
    assert f"{made.ratio.value:.2f}x" == "1.02x"


def with_captures(step_ms: float, at_s: Sequence[float]) -> Trial:
    """A run of a hundred steps that begin after a second, with captures of 200 ms each."""
    made = trial((step_ms, [1.0] * 100, [], 1.0, 1e8))
    made.process.captures += [Captured(0.2, at) for at in at_s]
    return made


def test_what_a_plan_captures_again_and_again_is_part_of_its_steps() -> None:
    """A cross-validation: 10 ms a step bare, 5 ms with the plan, and captures in between."""
    bare = [with_captures(10.0, ())] * 3
    once = Pairs({}, {"replay": "operators"}, bare, [with_captures(5.0, (1.0, 1.01))] * 3)
    assert once.ratio.value == pytest.approx(2.0)
    assert once.costs[1].warmup_s == pytest.approx(0.4)
    late = Pairs({}, {"replay": "operators"}, bare, [with_captures(5.0, (1.4,))] * 3)
    assert late.ratio.value == pytest.approx(2.0)  # as the only evaluation of the run
    again = [with_captures(5.0, (1.0, 1.1, 1.2, 1.3, 1.4, 1.5))] * 3
    often = Pairs({}, {"replay": "operators"}, bare, again)
    late_ms = 3 * 200 / 49  # at 1.3, 1.4 and 1.5 s, over half of the 97 steady steps
    assert often.ratio.value == pytest.approx(10 / (5 + late_ms), rel=1e-3)
    assert often.costs[1].warmup_s == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1.01, 1.2, "faster"), (0.8, 0.99, "slower"), (0.9, 1.3, "no measurable gain")],
)
def test_the_word_for_a_ratio_is_that_of_its_interval(low: float, high: float, said: str) -> None:
    ratio = Ratio(math.sqrt(low * high), low, high, 5)
    assert formatting.describe_ratio(ratio) == said
    claimed = dataclasses.replace(_document(), claim=ratio)
    assert words.claim_line(claimed).startswith(f"{said}: {ratio.value:.2f}x ({low:.2f} to ")


def _document() -> Document:
    run = (10.0, [1.0] * 30, [], 1.0, 1e8)
    return result.make_document(("x",), Path("p"), outcome([(trial(run), trial(run))] * 2))  # type: ignore[arg-type]


@given(st.floats(0, 4e5), st.floats(0, 4e5))
def test_a_difference_of_durations_is_that_of_what_is_printed(one: float, other: float) -> None:
    shown = [formatting.format_duration(seconds) for seconds in (one, other)]
    told = formatting.seconds_change(formatting.format_duration, one, other)
    assert float(told.split()[0]) == pytest.approx(shown[1].value - shown[0].value, abs=0.0501)
    for (text, value), seconds in zip(shown, (one, other), strict=True):
        assert (
            abs(value - seconds)
            <= 0.51
            * {"s": 0.1, "m": 1, "h": 60, "d": 3600}[
                "s" if text.count(" ") == 1 else text.split()[1][0]
            ]
        )


def test_a_refused_plan_shows_from_how_many_seeds_it_was_run() -> None:
    refused = Verdict(False, "the loss differs", "non-inferior", 20, True, (), seeds=5)
    document = result.make_document(("python", "x.py"), Path("plan.toml"), Outcome(verdict=refused))
    assert document.proof is not None
    assert document.proof.seeds == 5
