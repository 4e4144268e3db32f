"""Finding the knobs that make a proof fail."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from flatout import knobs
from flatout.knob import UnknownSettingError
from flatout.tune import search

PLAN = {
    "attention": "fast",
    "gc": "seldom",
    "optimizer": "fused",
    "precision": "bf16",
    "random": "fast",
    "threads": "half",
    "zero_grad": "none",
}


@pytest.mark.parametrize(
    "culprits", [{"precision"}, {"zero_grad"}, {"precision", "random"}, {"gc", "random", "threads"}]
)
def test_the_smallest_failing_part_is_found(culprits: set[str]) -> None:
    trials: list[frozenset[str]] = []

    def passes(settings: Mapping[str, str]) -> bool:
        assert all(PLAN[name] == setting for name, setting in settings.items())
        trials.append(frozenset(settings))
        return not culprits <= settings.keys()

    assert search.find_culprits(PLAN, passes) == {name: PLAN[name] for name in sorted(culprits)}
    assert len(set(trials)) == len(trials), "nothing is tried twice"
    assert frozenset() not in trials
    if len(culprits) == 1:
        assert len(trials) <= 6


def test_a_single_knob_needs_no_trial() -> None:
    def passes(settings: Mapping[str, str]) -> bool:
        raise AssertionError

    assert search.find_culprits({"precision": "bf16"}, passes) == {"precision": "bf16"}


def test_gentler_settings_end_at_off() -> None:
    assert search.find_gentler("precision", "bf16") == "safe"
    assert search.find_gentler("precision", "safe") == "medium"
    assert search.find_gentler("precision", "medium") is None
    assert search.find_gentler("precision", "bf16", ("bf16", "medium")) == "medium"
    assert search.find_gentler("random", "fast") == "same"
    assert search.find_gentler("random", "same") is None, "the form for proofs is no gain"
    with pytest.raises(UnknownSettingError):
        search.find_gentler("precision", "int3")


def test_paired_settings_draw_from_the_generator_as_torch_does() -> None:
    assert search.use_proof_settings(PLAN) == {**PLAN, "attention": "paired", "random": "paired"}
    assert search.use_proof_settings({"attention": "flash"}) == {"attention": "flash"}


def test_what_knobs_say_of_their_settings_is_about_settings_that_they_have() -> None:
    for knob in knobs.registry().values():
        assert set(knob.background_settings) <= set(knob.settings)
        if knob.proof_setting is not None:
            assert knob.exactness[knob.proof_setting] == "resampled"
