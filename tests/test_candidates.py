"""Which knobs are tried, in which order, and what is said of the others."""

from __future__ import annotations

import pytest

from flatout import knobs
from flatout.knob import Facts
from flatout.tune import candidates
from flatout.tune.candidates import Candidate
from flatout.wire.ratios import Ratio

OPERATORS = {"aten::addmm": 0.4, "aten::bernoulli_": 0.25, "aten::gelu": 0.1, "aten::add": 0.05}


def found(facts: Facts, **options: object) -> tuple[list[str], dict[str, str]]:
    listed, refused = candidates.find(
        facts,
        options.get("wanted"),
        options.get("exactness"),  # type: ignore[arg-type]
    )
    return [str(candidate) for candidate in listed], refused


def profiled(**shares: float) -> Facts:
    return Facts(
        "cpu",
        {"float32": 1e11, "bfloat16": 2e11},
        operators=OPERATORS,
        huge_pages="madvise",
        **{"optimizer_share": 0.2, "data_share": 0.0, "page_fault_share": 0.03, **shares},
    )


def test_the_largest_possible_gain_comes_first() -> None:
    listed, _ = found(profiled(), wanted=("optimizer", "precision", "random", "gc"))
    knob_order = list(dict.fromkeys(name.partition("=")[0] for name in listed))
    assert knob_order == ["precision", "random", "optimizer", "gc"]


def test_a_second_setting_is_tried_where_much_is_to_be_gained() -> None:
    assert found(profiled(), wanted=("precision",))[0] == ["precision=bf16", "precision=safe"]
    few = profiled(data_share=0.05)
    assert found(few, wanted=("loader",))[0] == ["loader=cache"]
    many = profiled(data_share=0.7)
    assert found(many, wanted=("loader",))[0] == ["loader=cache", "loader=prefetch"]


def test_a_hopeless_knob_is_not_tried_and_its_bound_said() -> None:
    listed, refused = found(profiled(optimizer_share=0.004), wanted=("optimizer",))
    assert listed == []
    assert refused["optimizer"] == ("it can speed up only 0.4% of a step, a gain of at most 1.004x")


def test_bounds_follow_amdahl() -> None:
    listed, _ = candidates.find(profiled(), ("optimizer", "gc"), None)
    bounds = {candidate.knob: candidate.bound for candidate in listed}
    assert bounds["optimizer"] == pytest.approx(1.25)
    assert bounds["gc"] is None


def test_what_starts_slowly_is_tried_in_processes_of_its_own() -> None:
    listed, _ = candidates.find(profiled(), ("compile", "gc", "allocator"), None)
    assert {c.knob: c.is_hot for c in listed} == {"compile": False, "gc": True, "allocator": False}


def test_classes_that_are_not_asked_for_are_left_out() -> None:
    listed, refused = found(profiled(), exactness=("bitwise", "reordered"))
    for name in listed:
        knob, _, setting = name.partition("=")
        assert knobs.get(knob).exactness[setting] in ("bitwise", "reordered")
    assert "of a class that --exactness excludes" in refused["precision"]


def test_every_knob_is_a_candidate_or_refused_with_a_reason() -> None:
    for facts in (profiled(), Facts("cpu"), Facts("cuda")):
        listed, refused = candidates.find(facts, None, None)
        assert {candidate.knob for candidate in listed} | set(refused) == set(knobs.registry())
        assert not {candidate.knob for candidate in listed} & set(refused)
        assert all(refused.values())


def test_what_the_others_make_a_larger_part_of_the_step_is_looked_at_again() -> None:
    precision = Candidate("precision", "bf16", True, 3.0)
    optimizer = Candidate("optimizer", "onepass", True, 1.02)  # 2 % of a step, 4 % of half of it
    no_effect = Ratio(1.0, 0.99, 1.01, 40)
    ratios = {precision: Ratio(2.0, 1.9, 2.1, 40), optimizer: no_effect}
    assert candidates.find_second_looks(ratios, {"precision": "bf16"}) == {"optimizer": "onepass"}
    large = Candidate("optimizer", "onepass", True, 1.2)
    assert candidates.find_second_looks({large: no_effect}, {}) == {}  # nothing has made it larger
    ratios = {precision: Ratio(1.05, 1.04, 1.06, 40), large: no_effect}
    assert candidates.find_second_looks(ratios, {"precision": "bf16"}) == {}


@pytest.mark.parametrize(
    ("candidate", "ratio"),
    [
        (Candidate("optimizer", "onepass", True, 1.2), Ratio(0.97, 0.95, 0.99, 40)),  # slower
        (Candidate("optimizer", "onepass", True, 1.005), Ratio(1.0, 0.99, 1.01, 40)),  # too little
        (Candidate("gc", "seldom", True, None), Ratio(1.0, 0.99, 1.01, 40)),  # nobody knows
        (Candidate("optimizer", "onepass", True, 1.2), None),  # not measured
        (Candidate("precision", "safe", True, 3.0), Ratio(1.0, 0.9, 1.1, 40)),  # has its setting
    ],
)
def test_what_is_not_looked_at_again(candidate: Candidate, ratio: Ratio | None) -> None:
    chosen = Candidate("precision", "bf16", True, 3.0)
    ratios = {chosen: Ratio(2.0, 1.9, 2.1, 40), candidate: ratio}
    assert candidates.find_second_looks(ratios, {"precision": "bf16"}) == {}


def test_the_most_promising_are_looked_at_again() -> None:
    named = ("optimizer", "random", "clipping", "cross_entropy", "elementwise")
    ratios: dict[Candidate, Ratio | None] = {
        Candidate(name, knobs.get(name).settings[-1], True, 1.1 + number / 100): Ratio(
            1.0, 0.99, 1.01, 40
        )
        for number, name in enumerate(named)
    }
    ratios[Candidate("precision", "bf16", True, 3.0)] = Ratio(2.0, 1.9, 2.1, 40)
    found = candidates.find_second_looks(ratios, {"precision": "bf16"})
    assert list(found) == ["elementwise", "cross_entropy", "clipping"]


def test_an_operator_that_costs_next_to_nothing_is_called_nevertheless() -> None:
    operators = {"aten::conv_transpose2d": 0.0, "aten::convolution_backward": 0.4}
    assert not Facts("cpu", operators=operators).lack("conv_transpose")
    assert Facts("cpu", operators=operators).lack("bernoulli")
    assert knobs.get("convolution").offer(Facts("cpu", operators=operators)).settings
