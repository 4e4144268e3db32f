"""Predicts the gain of a setting from replayed calls (``agent/replay.py``).

The agent (flatout's code inside the program) repeats the calls of operators and optimizers from a
step of the first run. It makes them one by one, bare (without any setting) and under each setting,
and times them. (The knob ``replay`` is something else.)

Let T be the time of a bare step. The replayed calls of the step take the time t bare, and t' under
the settings. If the rest of the step took as long as before, the gain would be

    T / (T - (t - t')) = 1 / (1 - sum of share[i] (1 - 1 / ratio[i])).

This is Amdahl's law (1967), where share[i] = t[i] / T and ratio[i] = t[i] / t'[i] for each call i.

A replayed call finds its tensors at hand, and nothing happens between replayed calls. So replayed
calls take less time than the same calls in the step, and an unknown part of the remaining time
T - t belongs to the calls as well. The estimate assumes that half of T - t is sped up by the same
factor as the calls. The limits of the interval assume that none or all of T - t is sped up, and
allow for the scatter of the measured times. The times of optimizers are scaled to the time that
they take in the step (``with_optimizer_ms``).

Settings also change the time of Python, the memory that a step holds between its calls, and the
layout of gradients. These effects are not predicted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from flatout import knobs
from flatout.tune import statistics
from flatout.tune.candidates import Candidate, Survey
from flatout.tune.ledger import Options
from flatout.wire.ratios import CONFIDENCE, Ratio
from flatout.wire.replay import BARE, OPTIMIZER_SUFFIX, Replayed, ReplayedCall, label, parse_label
from flatout.wire.request import Replay

REST_SHARE = 0.5
"""The share of the time outside the replayed calls that is assumed to be sped up by the same factor
as these calls."""

LEAST_COVERED = 0.4
"""Nothing is predicted if the replayed calls take less than this share of the operators' time."""

MOST_SECONDS = 25.0
"""The longest time that a replay may take, in seconds."""

BUDGET_SHARE = 0.08
"""The share of the budget that a replay may take."""

Settings = Mapping[str, str]


@dataclass(frozen=True)
class Prediction:
    """What the replay predicts for a setting.

    Attributes:
        alone: the gain of the setting on the bare program.
        most: the upper limit of the setting's gain, either on the bare program or on top of
            settings that change dtypes and layouts, whichever is larger.
    """

    alone: Ratio
    most: float


def make_request(options: Options) -> Replay | None:
    """Return the request for a replay under all replayable settings that the user allows; ``None``
    if there are no such settings."""
    allowed = tuple(
        f"{name}={setting}"
        for name, knob in knobs.registry().items()
        if knob.is_replayable and (options.knobs is None or name in options.knobs)
        for setting in knob.settings
        if setting != knob.proof_setting
        and (options.exactness is None or knob.exactness[setting] in options.exactness)
    )
    if not allowed:
        return None
    most = MOST_SECONDS
    if options.budget_seconds is not None:
        most = min(most, BUDGET_SHARE * options.budget_seconds)
    return Replay(allowed, least_seconds=min(Replay.least_seconds, most), most_seconds=most)


def with_optimizer_ms(replayed: Replayed, optimizer_ms: float | None) -> Replayed:
    """Return the replayed calls, with the times of optimizers scaled to their time in a step.

    In a step, optimizers take longer than in the replay, because their tensors are not in the
    caches, and because the memory for their results may be newly allocated.

    Args:
        replayed: the replayed calls.
        optimizer_ms: the time of the phase ``optimizer`` of a step, in ms; ``None``: not measured.
    """
    steps = [call for call in replayed.calls if call.name.endswith(OPTIMIZER_SUFFIX)]
    total_ms = sum(call.count * fmean(call.times_ms[BARE]) for call in steps)
    if not optimizer_ms or not total_ms:
        return replayed
    factor = optimizer_ms / total_ms
    scaled = {
        id(call): dataclasses.replace(
            call,
            times_ms={
                name: tuple(factor * ms for ms in times) for name, times in call.times_ms.items()
            },
        )
        for call in steps
    }
    calls = tuple(scaled.get(id(call), call) for call in replayed.calls)
    return dataclasses.replace(replayed, calls=calls)


def predict(
    replayed: Replayed, step_ms: float, settings: Settings, onto: Settings | None = None
) -> Ratio | None:
    """Predict by what factor settings speed up a step.

    Args:
        replayed: the replayed calls.
        step_ms: the time of a step of the bare program.
        settings: the settings, including those of ``onto``.
        onto: the settings on top of which the gain is predicted; ``None``: the bare program.

    Returns the predicted gain; ``None`` if some of the settings were not replayed.
    """
    onto = {} if onto is None else onto
    known = {one for name in replayed.settings for one in parse_label(name)}
    if not replayed.calls or not parse_label(label({**settings, **onto})) <= known:
        return None
    of_bare = _replayed_ms(replayed)
    before = [_find_times(call, onto) for call in replayed.calls]
    after = [_find_times(call, settings) for call in replayed.calls]
    counts = [call.count for call in replayed.calls]
    before_ms = sum(n * fmean(times) for n, times in zip(counts, before, strict=True))
    saved_ms = before_ms - sum(n * fmean(times) for n, times in zip(counts, after, strict=True))
    deviation_ms = math.sqrt(
        sum(n**2 * _variance(*pair) for n, *pair in zip(counts, before, after, strict=True))
    )
    # In each round, bare and all settings take turns. Calls on which no setting acts were timed
    # only once; all other calls have one time for each round.
    rounds = max(map(len, before))
    quantile = _quantile(rounds - 1)
    step_ms = max(step_ms, of_bare) - (of_bare - before_ms)  # the time of a step under ``onto``
    rest_ms = max(step_ms - before_ms, 0.0)

    def gain(saved_ms: float, share: float) -> float:
        """Return the gain if this share of the rest of the step belongs to the calls."""
        saved_ms *= 1 + share * rest_ms / before_ms
        return step_ms / max(step_ms - saved_ms, 0.02 * step_ms)

    margin_ms = quantile * deviation_ms
    bounds = [
        gain(saved_ms + sign * margin_ms, share) for sign in (-1.0, 1.0) for share in (0.0, 1.0)
    ]
    return Ratio(gain(saved_ms, REST_SHARE), min(bounds), max(bounds), rounds)


def _find_times(call: ReplayedCall, settings: Settings) -> Sequence[float]:
    """Return the times of a call under settings.

    Settings that do not act on the call are ignored. If several settings replace each other on the
    call, as kernels for the same operator do, the fastest of them is assumed to act.
    """
    wanted = parse_label(label(settings))
    found = [name for name in call.times_ms if parse_label(name) <= wanted]
    most = max(len(parse_label(name)) for name in found)
    times = [call.times_ms[name] for name in found if len(parse_label(name)) == most]
    return min(times, key=fmean)


def _variance(before_ms: Sequence[float], after_ms: Sequence[float]) -> float:
    """Return the variance of the mean time saved, estimated from the time saved in each round."""
    saved = [b - a for b, a in zip(before_ms, after_ms, strict=True)]
    return 0.0 if len(saved) < 2 or before_ms is after_ms else stdev(saved) ** 2 / len(saved)


def _quantile(degrees: int) -> float:
    from scipy import stats  # type: ignore[import-untyped]

    return float(stats.t.ppf((1 + CONFIDENCE) / 2, max(degrees, 1)))


def predict_candidates(
    replayed: Replayed, step_ms: float, candidates: Sequence[Candidate]
) -> dict[Candidate, Prediction]:
    """Predict the gains of the candidates that were replayed.

    Args:
        replayed: the replayed calls.
        step_ms: the time of a step of the bare program.
        candidates: the candidates.
    """
    of_bare = _replayed_ms(replayed)
    untimed_share = replayed.untimed_ms / (of_bare + replayed.untimed_ms)
    labels = [dict(one.split("=") for one in parse_label(name)) for name in replayed.settings]
    bases = [{}, *(one for one in labels if all(knobs.get(knob).inside for knob in one))]
    # If gradients accumulate over micro-batches, the replayed step may lack the optimizer's step. A
    # setting that acts on none of the replayed calls may act on the optimizer, so it then gets no
    # prediction.
    is_whole = any(call.name.endswith(OPTIMIZER_SUFFIX) for call in replayed.calls)
    acting = {one for call in replayed.calls for name in call.times_ms for one in parse_label(name)}
    found: dict[Candidate, Prediction] = {}
    for candidate in candidates:
        alone = predict(replayed, step_ms, candidate.settings)
        if alone is None or not (is_whole or str(candidate) in acting):
            continue
        gains = [
            predict(replayed, step_ms, {**base, **candidate.settings}, base)
            for base in bases
            if candidate.knob not in base
        ]
        most = max(gain.high for gain in gains if gain is not None)
        unseen_share = untimed_share
        if candidate.bound is not None:
            unseen_share *= 1 - 1 / candidate.bound
        found[candidate] = Prediction(alone, most / max(1 - unseen_share, 0.02))
    return found


def _replayed_ms(replayed: Replayed) -> float:
    """Return the time that the replayed calls of a step take without any setting, in ms."""
    return sum(call.count * fmean(call.times_ms[BARE]) for call in replayed.calls)


def _covers_enough(replayed: Replayed, step_ms: float, operators_share: float | None) -> bool:
    """Return whether the replayed calls take enough of the operators' time to predict a step."""
    if not replayed.calls:
        return False
    wanted_ms = step_ms * (1.0 if operators_share is None else operators_share)
    return _replayed_ms(replayed) + replayed.untimed_ms >= LEAST_COVERED * wanted_ms


def sort_out(
    survey: Survey, replayed: Replayed | None, step_ms: float, operators_share: float | None
) -> tuple[Survey, dict[Candidate, str]]:
    """Drop the candidates whose predicted gain is not worth having, and sort the others by
    ``Candidate.promise``, the largest first.

    Args:
        survey: the candidates.
        replayed: the replayed calls of the first run; ``None``: there are none.
        step_ms: the time of a step of the bare program.
        operators_share: the share of a step that operators take; ``None``: not known.

    Returns the survey with the candidates that are left; and the dropped candidates, each with the
    reason.
    """
    predictions: Mapping[Candidate, Prediction] = {}
    if replayed is not None and _covers_enough(replayed, step_ms, operators_share):
        predictions = predict_candidates(replayed, step_ms, survey.candidates)
    dropped: dict[Candidate, str] = {}
    kept = []
    for candidate in survey.candidates:
        prediction = predictions.get(candidate)
        if prediction is not None:
            candidate = dataclasses.replace(candidate, predicted=prediction.alone)
            if prediction.most < statistics.WORTHWHILE:
                why = f"replayed calls predict a gain of at most {prediction.most:.2f}x"
                dropped[candidate] = why
                continue
        kept.append(candidate)
    kept.sort(key=lambda one: -one.promise)
    return dataclasses.replace(survey, candidates=tuple(kept)), dropped


class Choice(NamedTuple):
    """The settings that predictions choose.

    Attributes:
        chosen: the chosen settings in the order of choice, each with its predicted gain on top of
            those before it.
        undecided: settings for which a gain worth having is predicted, but not with certainty, each
            with this gain. Of settings that exclude each other, only the one with the largest
            predicted gain is here.
        others: the settings that are left out, each with the reason.
    """

    chosen: dict[Candidate, Ratio]
    undecided: dict[Candidate, Ratio]
    others: dict[Candidate, str]


def choose_stack(replayed: Replayed, step_ms: float, candidates: Sequence[Candidate]) -> Choice:
    """Choose settings one after the other, by their predicted gains.

    Each time, the setting with the largest predicted gain on top of those before it is chosen,
    until no such gain is worth having. Settings that exclude each other (``Knob.claims``) are not
    chosen together.

    Args:
        replayed: the replayed calls.
        step_ms: the time of a step of the bare program.
        candidates: candidates with predictions.
    """
    stack: dict[str, str] = {}
    chosen: dict[Candidate, Ratio] = {}
    undecided: dict[Candidate, Ratio] = {}
    others: dict[Candidate, str] = {}
    left = list(candidates)
    while left:
        gains: dict[Candidate, Ratio] = {}
        for candidate in left:
            gain = predict(replayed, step_ms, {**stack, **candidate.settings}, stack)
            if gain is not None:
                gains[candidate] = gain
        best = next(iter(statistics.pick_winners(gains)), None)
        if best is None or gains[best].value < statistics.WORTHWHILE:
            left.sort(key=lambda one: -gains[one].value if one in gains else 0.0)
            for candidate in left:
                gain = gains.get(candidate)
                predicted = "no gain" if gain is None else f"{gain.value:.2f}x"
                others[candidate] = f"predicted {predicted} on top of the others"
                is_first = not any(_exclude_each_other(candidate, one) for one in undecided)
                if gain is not None and gain.value >= statistics.WORTHWHILE and is_first:
                    undecided[candidate] = gain
                    del others[candidate]
            break
        chosen[best] = gains[best]
        stack |= best.settings
        for candidate in left:
            if candidate != best and _exclude_each_other(candidate, best):
                others[candidate] = f"{best} gains more"
        left = [one for one in left if one not in chosen and one not in others]
    return Choice(chosen, undecided, others)


def _exclude_each_other(one: Candidate, other: Candidate) -> bool:
    claims = {one.knob, *knobs.get(one.knob).claims}
    return bool(claims & {other.knob, *knobs.get(other.knob).claims})
