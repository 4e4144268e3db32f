"""What is worth a trial: the knobs that match the profile, by the gain that they can bring."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flatout import knobs, machine
from flatout.doctor.case import Case
from flatout.knob import Exactness, Facts
from flatout.wire.ratios import Ratio

HOPELESS_SHARE = 0.01
"""Of a step, below which a knob is not tried: ten times less than what a dozen pairs can tell from
the drift of a shared machine."""

ALTERNATIVES_SHARE = 0.1
"""Of a step, from which on a knob's second setting is tried as well."""

SECOND_LOOKS = 3
"""Settings at most that are looked at again on top of the stack."""

SHORTER = 1.1
"""How many times as fast as bare the stack must be for that: what a part of the step may bring was
seen in the bare one, up to so much."""

SECOND_LOOK_SHARE = 0.02
"""Of the stack's step, which it must be able to save for that: what a comparison of some dozen
blocks can tell."""

UNKNOWN_SHARE = 0.05
"""In whose place a knob of unknown share stands in the order."""


@dataclass(frozen=True)
class Candidate:
    """A setting that is worth a trial.

    Attributes:
        knob, setting: what is set.
        is_hot: whether it is compared inside one process.
        bound: the speed-up that it cannot exceed, ``None``: not known.
    """

    knob: str
    setting: str
    is_hot: bool
    bound: float | None

    @property
    def settings(self) -> dict[str, str]:
        """As a plan."""
        return {self.knob: self.setting}

    def __str__(self) -> str:
        return f"{self.knob}={self.setting}"


def facts(case: Case) -> Facts:
    """What the first run has shown.

    Args:
        case: of that run; without a ceiling, the rates count as not measured.
    """
    is_profiled = bool(case.operators)
    phases = {phase: ms for phase, ms in case.phases_ms.items() if ms is not None}
    operators = None
    if is_profiled:
        operators = {o.name: o.share for o in case.operators_by_name}
    large = case.operators_share(lambda o: o.is_large)
    optimizers = case.facts.optimizers
    return Facts(
        device=case.device,
        matmul_flops_per_s=case.matmul_flops_per_s,
        updates=any(step.updates for step in case.steps),
        optimizers=None if optimizers is None else len(optimizers),
        huge_pages=machine.huge_pages(),
        threads=case.process.header.threads,
        main_dtype=case.main_dtype if is_profiled else None,
        operators=operators,
        optimizer_share=case.phase_share("optimizer") if phases else None,
        data_share=case.host_share("data") if phases else None,
        page_fault_share=case.page_fault_share if is_profiled else None,
        unfused_attention_share=(
            case.operators_share(lambda o: o.within == "attention") if is_profiled else None
        ),
        overhead_share=max(0.0, 1 - large) if is_profiled else None,
        loader_settings=case.facts.loader_settings,
        opens_images=case.facts.opens_images,
    )


def find(
    known: Facts, wanted: Collection[str] | None, exactness: Collection[Exactness] | None
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates, largest bound first, and why each other knob is not one.

    Args:
        known: of the job.
        wanted: names of the knobs to be looked at; ``None``: all.
        exactness: classes of the settings that may be tried; ``None``: all.
    """
    shares: dict[Candidate, float] = {}
    refused: dict[str, str] = {}
    for name, knob in knobs.registry().items():
        if wanted is not None and name not in wanted:
            continue
        match = knob.offer(known)
        allowed = [s for s in match.settings if exactness is None or knob.exactness[s] in exactness]
        if not match.settings:
            refused[name] = match.refusal or "it does not apply"
        elif not allowed:
            refused[name] = "its settings are of a class that is not asked for"
        elif match.share is not None and match.share < HOPELESS_SHARE:
            refused[name] = (
                f"hopeless: what it works on takes {match.share:.1%} of a step, so it gains "
                f"{match.bound:.3f}x at most"
            )
        else:
            share = UNKNOWN_SHARE if match.share is None else match.share
            is_hot = knob.hot and not knob.slow_start
            for setting in allowed[: 2 if share >= ALTERNATIVES_SHARE else 1]:
                shares[Candidate(name, setting, is_hot, match.bound)] = share
    return sorted(shares, key=lambda candidate: -shares[candidate]), refused


def second_looks(
    ratios: Mapping[Candidate, Ratio | None], settings: Mapping[str, str]
) -> dict[str, str]:
    """Settings that could not be told from no effect, and may bring more on top of the others.

    What they work on was a small part of the bare program's step, and is a larger one of a step
    that the others have made shorter.

    Args:
        ratios: what was found of each candidate among the others.
        settings: those that were faster.

    Returns the settings, the most promising first.
    """
    taken = {claim for knob in settings for claim in (knob, *knobs.get(knob).claims)}
    faster = math.prod(
        ratio.value
        for candidate, ratio in ratios.items()
        if ratio is not None and settings.get(candidate.knob) == candidate.setting
    )
    if faster < SHORTER:
        return {}
    looks: dict[Candidate, float] = {}
    for candidate, ratio in ratios.items():
        if ratio is None or ratio.high <= 1 or candidate.bound is None:
            continue
        share = min(1.0, faster * (1 - 1 / candidate.bound))
        if share >= SECOND_LOOK_SHARE:
            looks[candidate] = share
    found: dict[str, str] = {}
    for candidate in sorted(looks, key=lambda candidate: -looks[candidate]):
        takes = {candidate.knob, *knobs.get(candidate.knob).claims}
        if len(found) < SECOND_LOOKS and not takes & taken:
            found[candidate.knob] = candidate.setting
            taken |= takes
    return found
