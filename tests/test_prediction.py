"""Predicting gains from replayed calls: pure decisions on made-up times."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from flatout.tune import prediction
from flatout.tune.candidates import Candidate, Survey
from flatout.tune.ledger import Ledger, Options
from flatout.tune.pairs import Pace
from flatout.tune.predicted import PredictedScreening, choose_screening
from flatout.tune.screen import Screening, StopRule
from flatout.wire.ratios import Ratio
from flatout.wire.replay import BARE, Replayed, ReplayedCall, label, parse_label

BF16 = {"precision": "bf16"}
LAYOUT = {"memory_format": "channels_last"}
BOTH = {**BF16, **LAYOUT}
FAST = {"random": "fast"}
KERNEL = {"attention": "fast"}


def call(name: str, count: int, **times_ms: float) -> ReplayedCall:
    """A call that takes the same time in each of four rounds; ``bare`` is one of the times."""
    settings = {"bf16": BF16, "layout": LAYOUT, "both": BOTH, "fast": FAST, "kernel": KERNEL}
    settings["fast_bf16"] = {**FAST, **BF16}
    return ReplayedCall(
        name,
        count,
        {
            BARE if key == "bare" else label(settings[key]): (ms,) * 4
            for key, ms in times_ms.items()
        },
    )


ALL = tuple(map(label, (BF16, LAYOUT, BOTH, FAST, KERNEL)))


def made(*calls: ReplayedCall, untimed_ms: float = 0.0) -> Replayed:
    step = ReplayedCall("AdamW.step", 1, {BARE: (0.0,) * 4})
    return Replayed(ALL, (*calls, step), untimed_ms)


def test_a_label_can_be_read() -> None:
    assert parse_label(label(BOTH)) == {"precision=bf16", "memory_format=channels_last"}
    assert parse_label(BARE) == frozenset()


def test_the_gain_is_amdahls_law_over_the_calls() -> None:
    replayed = made(call("linear", 10, bare=6.0, bf16=2.0), call("relu", 20, bare=2.0))
    ratio = prediction.predict(replayed, 100.0, BF16)
    assert ratio is not None
    shares, ratios = (0.6, 0.4), (3.0, 1.0)
    saved = sum(share * (1 - 1 / one) for share, one in zip(shares, ratios, strict=True))
    assert ratio.value == pytest.approx(1 / (1 - saved))
    assert (ratio.low, ratio.high) == pytest.approx((ratio.value, ratio.value))


def test_the_rest_of_the_step_widens_the_interval() -> None:
    replayed = made(call("linear", 10, bare=6.0, bf16=3.0))
    ratio = prediction.predict(replayed, 100.0, BF16)
    assert ratio is not None
    assert ratio.low == pytest.approx(1 / (1 - 0.3))  # the rest gains nothing
    assert ratio.high == pytest.approx(2.0)  # the rest gains as the calls do
    assert ratio.low < ratio.value < ratio.high


def test_calls_that_take_longer_than_the_step_are_the_whole_step() -> None:
    replayed = made(call("linear", 10, bare=6.0, bf16=3.0))
    ratio = prediction.predict(replayed, 30.0, BF16)
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)


def test_a_call_on_which_a_setting_does_not_act_keeps_its_time() -> None:
    replayed = made(
        call("dropout", 1, bare=4.0, fast=1.0, bf16=3.0, fast_bf16=0.5),
        call("linear", 1, bare=6.0, bf16=2.0),
    )
    both = prediction.predict(replayed, 10.0, {**FAST, **BF16})
    on_top = prediction.predict(replayed, 10.0, {**FAST, **BF16}, BF16)
    alone = prediction.predict(replayed, 10.0, FAST)
    assert both is not None
    assert on_top is not None
    assert alone is not None
    assert both.value == pytest.approx(10 / 2.5)
    assert on_top.value == pytest.approx(5 / 2.5)  # a larger part of a shorter step
    assert alone.value == pytest.approx(10 / 7)


def test_of_two_kernels_for_a_call_one_acts() -> None:
    replayed = made(call("attention", 1, bare=8.0, fast=4.0, kernel=1.0))
    ratio = prediction.predict(replayed, 8.0, {**FAST, **KERNEL})
    assert ratio is not None
    assert ratio.value == pytest.approx(8.0)


def test_what_was_not_replayed_is_not_predicted() -> None:
    replayed = made(call("linear", 1, bare=1.0))
    assert prediction.predict(replayed, 1.0, {"threads": "one"}) is None
    assert prediction.predict(Replayed(ALL), 1.0, BF16) is None
    nothing = prediction.predict(replayed, 1.0, FAST)
    assert nothing is not None
    assert nothing.value == nothing.high == 1.0


def test_the_interval_holds_the_truth_under_noise() -> None:
    """Each round has a speed of its own, and each time its own noise."""
    generator, held, truth, repeats = random.Random(0), 0, 10 / 6.5, 400
    for _ in range(repeats):
        speeds = [generator.lognormvariate(0, 0.3) for _ in range(6)]

        def noisy(ms: float, speeds: list[float] = speeds) -> tuple[float, ...]:
            return tuple(ms * speed * generator.lognormvariate(0, 0.03) for speed in speeds)

        calls = tuple(
            ReplayedCall("linear", 1, {BARE: noisy(bare), label(BF16): noisy(lowered)})
            for bare, lowered in ((4.0, 2.0), (3.0, 1.5), (3.0, 3.0))
        )
        ratio = prediction.predict(made(*calls), 0.0, BF16)
        assert ratio is not None
        held += ratio.low <= truth <= ratio.high
    assert held >= 0.9 * repeats


def candidate(settings: dict[str, str], bound: float | None = 2.0) -> Candidate:
    ((knob, setting),) = settings.items()
    return Candidate(knob, setting, True, bound)


def sorted_out(
    replayed: Replayed | None, *settings: dict[str, str], step_ms: float = 10.0
) -> tuple[list[str], dict[str, str]]:
    survey = Survey(tuple(map(candidate, settings)), {}, {}, [])
    kept, dropped = prediction.sort_out(survey, replayed, step_ms, 0.9)
    return list(map(str, kept.candidates)), {str(one): why for one, why in dropped.items()}


def test_candidates_without_a_predicted_gain_are_dropped_and_the_others_ordered() -> None:
    replayed = made(
        call("linear", 1, bare=6.0, bf16=3.0, layout=6.5, both=3.5),
        call("dropout", 1, bare=4.0, fast=0.5),
    )
    kept, dropped = sorted_out(replayed, BF16, LAYOUT, FAST, KERNEL)
    assert kept == ["random=fast", "precision=bf16"]
    assert set(dropped) == {"memory_format=channels_last", "attention=fast"}
    assert "predict a gain of at most 1.0" in dropped["attention=fast"]


def test_a_setting_that_gains_only_on_top_of_another_stays() -> None:
    replayed = made(call("conv2d", 1, bare=10.0, bf16=5.0, layout=10.0, both=2.0))
    kept, dropped = sorted_out(replayed, BF16, LAYOUT)
    assert "memory_format=channels_last" in kept
    assert not dropped


def test_nothing_is_dropped_where_the_calls_are_not_the_step() -> None:
    small = made(call("linear", 1, bare=1.0))
    assert sorted_out(small, BF16) == (["precision=bf16"], {})
    assert sorted_out(None, BF16) == (["precision=bf16"], {})


def test_a_part_of_a_step_without_the_optimizer_says_nothing_of_what_may_act_there() -> None:
    part = Replayed(ALL, (call("linear", 1, bare=10.0, bf16=9.99),))
    kept, dropped = sorted_out(part, BF16, FAST)
    assert kept == ["random=fast"]
    assert set(dropped) == {"precision=bf16"}


def test_calls_that_there_was_no_time_for_count_as_far_as_the_profile_allows() -> None:
    untimed = made(call("linear", 1, bare=5.0), untimed_ms=5.0)
    kept, dropped = sorted_out(untimed, FAST)
    assert kept == ["random=fast"]
    assert not dropped


def test_the_request_names_what_the_user_allows() -> None:
    made_request = prediction.make_request

    def settings(options: Options) -> tuple[str, ...]:
        request = made_request(options)
        assert request is not None
        return request.settings

    everything = settings(Options())
    assert "precision=bf16" in everything
    assert "random=paired" not in everything  # for proofs only
    assert not [one for one in everything if one.startswith(("threads", "mkl", "compile"))]
    assert settings(Options(exactness=("bitwise",))) == ("random=same",)
    of_optimizer = ("optimizer=fused", "optimizer=onepass")
    assert settings(Options(knobs=("optimizer",))) == of_optimizer
    assert made_request(Options(knobs=("threads",))) is None
    short = made_request(Options(budget_seconds=20.0))
    assert short is not None
    assert short.most_seconds < 2.0
    assert short.least_seconds <= short.most_seconds


def test_a_candidate_promises_what_is_predicted() -> None:
    predicted = prediction.predict(made(call("linear", 1, bare=2.0, bf16=1.0)), 2.0, BF16)
    one = dataclasses.replace(candidate(BF16, 8.0), predicted=predicted)
    assert one.promise == pytest.approx(2.0)
    assert candidate(BF16, 8.0).promise == 8.0


def test_an_optimizer_takes_as_long_as_in_the_step() -> None:
    step = ReplayedCall("Adam.step", 1, {BARE: (2.0,) * 3, "optimizer=onepass": (1.0,) * 3})
    replayed = Replayed(("optimizer=onepass",), (step, call("linear", 1, bare=4.0)))
    onepass = {"optimizer": "onepass"}
    longer = prediction.with_optimizer_ms(replayed, 6.0)
    ratio = prediction.predict(longer, 10.0, onepass)
    assert ratio is not None
    assert ratio.value == pytest.approx(10 / 7)
    assert prediction.with_optimizer_ms(replayed, None) is replayed


def predicted(*settings: dict[str, str]) -> list[Candidate]:
    ratio = Ratio(1.5, 1.4, 1.6, 4)
    return [dataclasses.replace(candidate(one), predicted=ratio) for one in settings]


def test_a_stack_takes_what_gains_on_top_of_it() -> None:
    replayed = made(
        call("conv2d", 1, bare=10.0, bf16=5.0, layout=10.0, both=2.0),
        call("dropout", 1, bare=1.0, fast=0.9),
    )
    chosen, undecided, others = prediction.choose_stack(
        replayed, 11.0, predicted(FAST, LAYOUT, BF16, KERNEL)
    )
    assert not undecided
    assert list(map(str, chosen)) == [
        *("precision=bf16", "memory_format=channels_last", "random=fast"),
    ]
    assert chosen[next(iter(chosen))].value == pytest.approx(11 / 6)
    assert {str(one): why for one, why in others.items()} == {
        "attention=fast": "predicted 1.00x on top of the others"
    }


def test_settings_that_exclude_each_other_are_not_chosen_together() -> None:
    replayed = Replayed(
        (label(BF16), "precision=safe"),
        (
            ReplayedCall(
                "linear",
                1,
                {BARE: (4.0,) * 3, label(BF16): (2.0,) * 3, "precision=safe": (3.0,) * 3},
            ),
        ),
    )
    safe = {"precision": "safe"}
    chosen, _, others = prediction.choose_stack(replayed, 4.0, predicted(safe, BF16))
    assert list(map(str, chosen)) == ["precision=bf16"]
    assert list(others.values()) == ["precision=bf16 gains more"]


SAFE = {"precision": "safe"}


def uncertain() -> Replayed:
    """Calls that a lower precision makes faster on average, and by no means each time."""
    times = {
        BARE: (500.0,) * 4,
        label(BF16): (200.0, 700.0, 300.0, 400.0),
        label(SAFE): (300.0, 700.0, 300.0, 400.0),
    }
    return Replayed((label(BF16), label(SAFE)), (ReplayedCall("linear", 1, times),))


def test_what_is_predicted_a_gain_in_doubt_is_undecided() -> None:
    choice = prediction.choose_stack(uncertain(), 1000.0, predicted(SAFE, BF16))
    assert not choice.chosen
    assert list(map(str, choice.undecided)) == ["precision=bf16"]
    assert list(map(str, choice.others)) == ["precision=safe"]


@pytest.mark.parametrize(
    ("half", "bf16_ms", "is_in_plan"),
    [(0.01, 800.0, True), (0.3, 800.0, True), (0.3, 990.0, False), (0.01, 1010.0, False)],
)
def test_an_undecided_prediction_is_decided_by_whole_steps_or_left_to_the_proof(
    half: float, bf16_ms: float, is_in_plan: bool
) -> None:
    hot = predicted(BF16, SAFE)

    class Doubting(Screened):
        def _compare_with_first(
            self, arms: Sequence[Mapping[str, str]], stop_rule: StopRule, what: str
        ) -> dict[int, Ratio]:
            found = super()._compare_with_first(arms, stop_rule, what)
            return {
                n: Ratio(r.value, r.value * (1 - half), r.value * (1 + half), 5)
                for n, r in found.items()
            }

    screening = Doubting(hot, lambda knobs: bf16_ms if "precision" in knobs else 1000.0)
    screening._bare.process.replayed = uncertain()
    assert screening.find_stack(hot) == (BF16 if is_in_plan else {})
    assert screening.compared == [[label({}), label(BF16)]]


class Screened(PredictedScreening):
    """A screening whose comparisons of whole steps are made up: the time of each stack."""

    def __init__(self, hot: Sequence[Candidate], step_ms: Callable[[set[str]], float]) -> None:
        ledger = Ledger(60.0, lambda: 0.0, lambda line: None, lambda *_: None)
        ledger.enter(hot)
        self.ledger = ledger
        replayed = made(
            call("linear", 1, bare=500.0, bf16=200.0), call("dropout", 1, bare=500.0, fast=470.0)
        )
        bare: Any = SimpleNamespace(
            job_steps=None, process=SimpleNamespace(replayed=replayed), pace=Pace(1.0, 1.0)
        )
        super().__init__(SimpleNamespace(), ledger, bare, Options())  # type: ignore[arg-type]
        self.step_ms = step_ms
        self.compared: list[list[str]] = []

    def _compare_with_first(
        self, arms: Sequence[Mapping[str, str]], stop_rule: StopRule, what: str
    ) -> dict[int, Ratio]:
        self.compared.append([label(arm) for arm in arms])
        first, *others = (self.step_ms(set(arm)) for arm in arms)
        ratios = [first / ms for ms in others]
        return {n: Ratio(x, 0.99 * x, 1.01 * x, 9) for n, x in enumerate(ratios, 1)}


def test_slow_steps_are_compared_only_for_what_is_not_predicted() -> None:
    hot = [*predicted(BF16, FAST), candidate({"threads": "one"}), candidate({"gc": "seldom"})]
    screening = Screened(
        hot, lambda knobs: 0.5 - 0.1 * ("gc" in knobs) + 0.2 * ("threads" in knobs)
    )
    stack = screening.find_stack(hot)
    assert stack == {"precision": "bf16", "random": "fast", "gc": "seldom"}
    start = label({**BF16, **FAST})
    assert screening.compared == [
        [start, label({**BF16, **FAST, "threads": "one"}), label({**BF16, **FAST, "gc": "seldom"})]
    ]
    assert screening.ledger.find({"threads": "one"}).state == "no gain"
    assert "predicted" in screening.ledger.find(BF16).why


def test_what_excludes_a_chosen_setting_is_not_compared_on_top_of_it() -> None:
    hot = [*predicted(BF16), candidate({"replay": "operators"}), candidate({"gc": "seldom"})]
    screening = Screened(hot, lambda knobs: 0.5 - 0.1 * ("gc" in knobs))
    assert screening.find_stack(hot) == {"precision": "bf16", "gc": "seldom"}
    assert screening.compared == [[label(BF16), label({**BF16, "gc": "seldom"})]]
    assert "cannot be used together" in screening.ledger.find({"replay": "operators"}).why


def test_where_all_is_predicted_no_step_is_compared() -> None:
    hot = predicted(BF16, FAST)
    screening = Screened(hot, lambda knobs: 1.0)
    assert screening.find_stack(hot) == {"precision": "bf16", "random": "fast"}
    assert not screening.compared


def test_only_slow_steps_are_screened_by_predictions() -> None:
    assert choose_screening(1.0, predicted(BF16)) is PredictedScreening
    assert choose_screening(0.01, predicted(BF16)) is Screening
    assert choose_screening(1.0, [candidate(BF16)]) is Screening
