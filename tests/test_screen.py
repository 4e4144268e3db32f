"""Screening on made-up comparisons: what it settles, and what it removes from the stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_memory import STEP

from flatout.tune.budget import ProofSize
from flatout.tune.candidates import Candidate
from flatout.tune.document import State
from flatout.tune.ledger import Ledger, Options
from flatout.tune.pairs import Pace
from flatout.tune.screen import (
    BLOCK_S,
    MAXIMUM_ROUNDS,
    Screening,
    StopRule,
    build_arms,
    count_fewest_rounds,
    size_comparison,
)
from flatout.tune.trial import Trial, TrialFailedError
from flatout.wire.header import Header
from flatout.wire.lines import AgentEvent
from flatout.wire.ratios import Ratio
from flatout.wire.record import ProcessRecord
from flatout.wire.request import Comparison, Request

HOT = [
    Candidate(knob, setting, is_hot=True, bound=None)
    for knob, setting in {"optimizer": "onepass", "random": "fast", "gc": "seldom"}.items()
]
STACK = {"optimizer": "onepass", "random": "fast", "gc": "seldom"}


TRAINS: Any = SimpleNamespace(trains=True)


class ModelledScreening(Screening):
    """A screening whose comparisons of stacks are computed from made-up step times."""

    def __init__(self, step_ms: Mapping[frozenset[str], float]) -> None:
        ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
        ledger.enter(HOT)
        bare: Any = SimpleNamespace(job_steps=None, pace=Pace(0.0, 0.01))
        super().__init__(SimpleNamespace(), ledger, bare, Options())  # type: ignore[arg-type]
        self.ledger = ledger
        self.step_ms = step_ms

    def _compare_with_first(
        self, arms: Sequence[Mapping[str, str]], stop_rule: StopRule, what: str
    ) -> dict[int, Ratio]:
        first, *others = (self.step_ms[frozenset(arm)] for arm in arms)
        return {
            number: Ratio(first / ms, 0.99 * first / ms, 1.01 * first / ms, 40)
            for number, ms in enumerate(others, 1)
        }


def model(needed: Sequence[frozenset[str]]) -> dict[frozenset[str], float]:
    """Step times of all subsets: each need that none of its knobs meets adds 20 % to a step."""
    names = list(STACK)
    subsets = [
        frozenset(name for bit, name in enumerate(names) if mask >> bit & 1)
        for mask in range(2 ** len(names))
    ]
    return {part: 10.0 * 1.2 ** sum(not need & part for need in needed) for part in subsets}


@pytest.mark.parametrize(
    ("needed", "kept"),
    [
        ([{"optimizer"}, {"random"}, {"gc"}], 3),
        ([{"optimizer"}], 1),
        ([{"optimizer"}, {"random", "gc"}], 2),
        ([{"optimizer", "random", "gc"}], 1),
    ],
)
def test_of_settings_that_make_up_for_each_other_one_stays(
    needed: list[set[str]], kept: int
) -> None:
    step_ms = model([frozenset(need) for need in needed])
    stack = ModelledScreening(step_ms)._reduce(dict(STACK))
    assert len(stack) == kept
    assert step_ms[frozenset(stack)] == step_ms[frozenset(STACK)], "a gain was lost"


def test_a_ratio_belongs_to_a_setting_and_not_to_its_knob() -> None:
    ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
    bf16, safe = (
        Candidate("precision", name, is_hot=True, bound=None) for name in ("bf16", "safe")
    )
    ledger.enter([bf16, safe])
    fast, slow = Ratio(2.0, 1.9, 2.1, 40), Ratio(1.2, 1.1, 1.3, 40)
    ledger.note_ratio(bf16, fast)
    ledger.note_on_top("precision", "bf16", fast)
    assert ledger.outcome.find_ratio_in_process("precision", "bf16") == fast
    assert ledger.outcome.find_ratio_in_process("precision", "safe") is None
    ledger.note_ratio(safe, slow)
    assert ledger.outcome.find_ratio_in_process("precision", "safe") == slow
    assert ledger.outcome.find_gain_on_top("precision", "bf16") == fast
    assert ledger.outcome.find_gain_on_top("precision", "safe") is None


@pytest.mark.parametrize("step_s", [1e-4, 1e-3, 5e-3])
def test_a_short_job_gets_fewer_rounds_before_its_blocks_become_shorter(step_s: float) -> None:
    arms = ({}, {"gc": "seldom"}, {"random": "fast"})

    def size(job_steps: int | None) -> Comparison:
        return size_comparison(
            arms, "arms", limit_s=100.0, pace=Pace(0.0, step_s), job_steps=job_steps
        )

    whole = size(None)
    assert whole.rounds == MAXIMUM_ROUNDS
    assert whole.block_steps * step_s >= 0.99 * BLOCK_S
    half = size(whole.longest_steps // 2)
    assert half.block_steps == whole.block_steps
    assert half.discard_steps == whole.discard_steps
    assert half.longest_steps <= whole.longest_steps // 2
    assert half.rounds < MAXIMUM_ROUNDS
    fewest = count_fewest_rounds(len(arms))
    job_steps = len(arms) * fewest * (whole.block_steps - 1) + 9
    shortest = size(job_steps)
    assert shortest.rounds == fewest
    assert shortest.longest_steps <= job_steps
    assert shortest.block_steps == whole.block_steps - 1


def finished(*events: AgentEvent) -> Trial:
    return Trial(ProcessRecord(Path(), Header(), events=list(events)), 1.0, ended=False)


class FailingScreening(ModelledScreening):
    """A screening whose first group fails in part, and whose second group crashes."""

    def __init__(self) -> None:
        super().__init__({})
        self.compared: list[list[str]] = []

    def _divide(self, hot: Sequence[Candidate]) -> list[list[Candidate]]:
        return [list(hot[:2]), list(hot[2:])]

    def _compare(
        self,
        arms: Sequence[Mapping[str, str]],
        stop_rule: StopRule,
        share: float,
        compared: Sequence[Candidate] | str,
    ) -> tuple[Trial, Comparison]:
        assert not isinstance(compared, str)
        self.ledger.start(compared, "inside one process")
        self.compared.append([candidate.knob for candidate in compared])
        if stop_rule == "settings" and compared[0].knob == "gc":
            raise TrialFailedError("it failed with exit code 1", None, "")
        return finished(
            AgentEvent(0.0, "failed", "optimizer=onepass", "no kernel", None),
            AgentEvent(0.0, "unused", "random", "no dropout was called", None),
        ), Comparison(arms=tuple(map(dict, arms)))


class MeasuringScreening(ModelledScreening):
    """A screening in which settings of ``precision`` have the speedups given, and nothing else has.

    Args:
        speedups: by setting.
        events: what the agent records of each comparison.
    """

    def __init__(self, speedups: Mapping[str, float], *events: AgentEvent) -> None:
        super().__init__({})
        self.speedups = speedups
        self.events = events

    def _compare(
        self,
        arms: Sequence[Mapping[str, str]],
        stop_rule: StopRule,
        share: float,
        compared: Sequence[Candidate] | str,
    ) -> tuple[Trial, Comparison]:
        comparison = Comparison(arms=tuple(map(dict, arms)), block_steps=2, discard_steps=1)
        done = finished(*self.events)
        for block, arm in enumerate([*range(len(arms))] * 8):
            speedup = self.speedups.get(arms[arm].get("precision", ""), 1.0)
            step = replace(STEP, arm=arm, step_ms=10.0 / speedup, block=block)
            done.process.steps += [replace(step, mark="switched"), step]
        return done, comparison


def test_a_setting_that_fails_leaves_the_other_settings_of_its_knob() -> None:
    failure = AgentEvent(0.0, "failed", "precision=bf16", "no units", None)
    screening = MeasuringScreening({"safe": 2.0}, failure)
    bf16, safe = (
        Candidate("precision", name, is_hot=True, bound=None) for name in ("bf16", "safe")
    )
    screening.ledger.enter([bf16, safe])
    assert screening._rank([bf16, safe, *HOT]) == {"precision": "safe"}
    assert screening.ledger.find(bf16.settings).state == "failed"
    ratio = screening.ledger.find(safe.settings).ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("names", [("bf16", "safe"), ("safe", "bf16")])
def test_of_two_faster_settings_of_a_knob_the_slower_one_is_left_out(
    names: tuple[str, str],
) -> None:
    screening = MeasuringScreening({"bf16": 2.0, "safe": 1.5})
    precisions = [Candidate("precision", name, is_hot=True, bound=None) for name in names]
    screening.ledger.enter(precisions)
    assert screening._rank([*precisions, *HOT]) == {"precision": "bf16"}
    states = {one.setting: screening.ledger.find(one.settings).state for one in precisions}
    assert states == {"bf16": "won", "safe": "left out"}


class ShortJobs:
    """The runner of trials of a job that has few steps, which is not known before."""

    def __init__(self, job_steps: int, arms_ms: Sequence[float] = ()) -> None:
        self.job_steps = job_steps
        self.arms_ms = arms_ms
        self.requests: list[Request] = []

    def run(self, request: Request, limit_s: float) -> Trial:
        comparison = request.comparison
        assert comparison is not None
        self.requests.append(request)
        count = min(comparison.longest_steps, self.job_steps)
        steps = [STEP] * count
        if self.arms_ms:
            blocks, arms = count // comparison.block_steps, len(comparison.arms)
            steps = [
                replace(
                    STEP,
                    arm=block % arms,
                    step_ms=self.arms_ms[block % arms],
                    block=block,
                    mark=None if number >= comparison.discard_steps else "switched",
                )
                for block in range(blocks)
                for number in range(comparison.block_steps)
            ]
        process = ProcessRecord(Path(), Header(), steps=steps)
        return Trial(process, 1.0, ended=comparison.longest_steps > self.job_steps)


def screen_short_job(
    job_steps: int, arms_ms: Sequence[float] = ()
) -> tuple[Screening, ShortJobs, Ledger]:
    ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
    bare: Any = SimpleNamespace(
        job_steps=None, pace=Pace(0.0, 0.01), proof=ProofSize(20, 5, 2), process=TRAINS
    )
    trials: Any = ShortJobs(job_steps, arms_ms)
    return Screening(trials, ledger, bare, Options()), trials, ledger


def test_candidates_are_divided_again_when_the_job_turns_out_to_be_short() -> None:
    names = ("optimizer", "random", "gc", "clipping", "elementwise", "embedding", "threads", "mkl")
    hot = [Candidate(name, "on", is_hot=True, bound=None) for name in names]
    screening, trials, ledger = screen_short_job(150)
    ledger.enter(hot)
    screening._rank(hot)
    whole, *groups = (request.comparison for request in trials.requests)
    assert whole is not None
    assert len(whole.arms) == 17
    assert [len(one.arms) for one in groups if one is not None] == [8, 8, 9]
    assert all(one.longest_steps <= 150 for one in groups if one is not None)
    assert all(ledger.is_settled(candidate.settings) for candidate in hot)


def test_what_was_compared_before_a_job_ended_is_not_thrown_away() -> None:
    found = Candidate("optimizer", "onepass", is_hot=True, bound=None)
    arms_ms = [5.0 if arm else 10.0 for arm in build_arms([found])]
    screening, trials, ledger = screen_short_job(4 * (len(arms_ms) + 2), arms_ms)
    ledger.enter([found])
    assert screening._rank([found]) == {"optimizer": "onepass"}
    assert len(trials.requests) == 1
    ratio = ledger.find(found.settings).ratio
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0, rel=0.01)


def test_settings_that_share_the_cpus_are_compared_each_alone() -> None:
    """One thread is fast beside a process that prefetches, and slow alone."""
    one, ahead, gc, random = (
        Candidate(*name.split("="), is_hot=True, bound=None)
        for name in ("threads=one", "loader=prefetch", "gc=seldom", "random=fast")
    )
    arms = build_arms([one, gc, ahead, random])
    assert arms[0] == {}
    assert [arm for arm in arms if arm.keys() & {"threads", "loader"}] == [
        {"threads": "one"},
        {"loader": "prefetch"},
    ]
    assert {"gc": "seldom", "random": "fast"} in arms
    assert build_arms([one, ahead]) == ({}, {"threads": "one"}, {"loader": "prefetch"})


def test_settings_that_are_slow_to_switch_are_compared_each_alone() -> None:
    pages, gc = (
        Candidate(*name.split("="), is_hot=True, bound=None)
        for name in ("code_pages=huge", "gc=seldom")
    )
    arms = build_arms([pages, gc])
    assert [arm for arm in arms if "code_pages" in arm] == [{"code_pages": "huge"}]


def test_a_stack_is_kept_as_it_is_when_the_job_turns_out_to_be_short() -> None:
    screening, trials, _ = screen_short_job(25)
    assert screening._reduce(dict(STACK)) == STACK
    assert len(trials.requests) == 1


def test_what_is_settled_is_not_compared_again_and_nothing_stays_running() -> None:
    screening = FailingScreening()
    assert screening._rank(HOT) == {}
    assert screening.compared == [["optimizer", "random"], ["gc"], ["gc"]]
    states: dict[str, State] = {
        candidate.knob: screening.ledger.find(candidate.settings).state for candidate in HOT
    }
    assert states == {"optimizer": "failed", "random": "no gain", "gc": "not tried"}
    assert "too few steps" in screening.ledger.find({"gc": "seldom"}).why


def test_promising_settings_that_there_is_no_time_to_compare_are_left_to_the_proof() -> None:
    """A step of 7 s: what cannot be compared in the budget may still be proven."""
    ledger = Ledger(700.0, lambda: 90.0, lambda line: None, lambda *_: None)
    bare: Any = SimpleNamespace(
        job_steps=None, pace=Pace(2.0, 7.0), proof=ProofSize(8, 3, 1), process=TRAINS
    )
    bounds = {
        ("precision", "bf16"): 3.0,
        ("precision", "safe"): 3.0,
        ("attention", "fast"): 1.5,
        ("optimizer", "onepass"): 1.03,
        ("gc", "seldom"): None,
    }
    hot = [Candidate(*name, is_hot=True, bound=bound) for name, bound in bounds.items()]
    trials: Any = ShortJobs(10**6)
    screening = Screening(trials, ledger, bare, Options())
    ledger.enter(hot)
    assert screening._rank(hot) == {"precision": "bf16", "attention": "fast"}
    assert not trials.requests
    assert ledger.find({"gc": "seldom"}).state == "not tried"
    assert "needs a --budget of" in ledger.find({"gc": "seldom"}).why
