"""Finds the candidates: the settings that fit the profile, sorted by their possible gain."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flatout import knobs, machine
from flatout.doctor.case import Case
from flatout.doctor.findings import Finding, find_all
from flatout.knob import OPTIMIZER_STEP, Exactness, Facts
from flatout.launch import isolation
from flatout.machine import Ceilings
from flatout.tune import memory
from flatout.wire.ratios import Ratio
from flatout.wire.record import ProcessRecord

HOPELESS_SHARE = 0.01
"""A knob is not tried if the work that it speeds up takes less than this share of a step. Its
speedup would be at most 1.01. That is less than ``statistics.WORTHWHILE``, and too small to be
measured."""

ALTERNATIVES_SHARE = 0.1
"""A knob's second setting is tried as well if the work that the knob speeds up takes at least this
share of a step."""

UNKNOWN_SHARE = 0.05
"""Share of a step that a knob is assumed to speed up if the share is not known."""

SECOND_LOOKS = 3
"""Maximum number of settings that are compared once more on top of the stack. The stack is the
settings that have won, applied together."""

SECOND_LOOK_SPEEDUP = 1.1
"""Settings are compared once more only if the stack is at least this many times as fast as the bare
program. If the stack gains less, the work that a setting speeds up takes about the same share of
the stack's step as of the bare step, so the first comparison is good enough."""

SECOND_LOOK_SHARE = 0.02
"""A setting is compared once more only if it could save at least this share of the stack's step. A
comparison cannot measure a smaller gain: it alternates between settings only a few dozen times."""


@dataclass(frozen=True)
class Candidate:
    """A setting that is worth a trial.

    Attributes:
        knob, setting: the names of the knob and its setting.
        is_hot: whether the setting is compared with others inside one process. Such a setting can
            be applied and undone between two steps, and its first steps are not slow.
        bound: the upper limit of the setting's speedup; ``None`` if it is not known.
        predicted: the speedup that replayed calls predict (``prediction.py``); ``None`` if there
            is no prediction.
    """

    knob: str
    setting: str
    is_hot: bool
    bound: float | None
    predicted: Ratio | None = None

    @property
    def promise(self) -> float:
        """The predicted speedup. Without a prediction, it is the bound; if the bound is not known
        either, it is the bound that ``UNKNOWN_SHARE`` implies."""
        if self.predicted is not None:
            return self.predicted.value
        return 1 / (1 - UNKNOWN_SHARE) if self.bound is None else self.bound

    @property
    def settings(self) -> dict[str, str]:
        """The setting as a plan of its own."""
        return {self.knob: self.setting}

    def __str__(self) -> str:
        return f"{self.knob}={self.setting}"


@dataclass(frozen=True)
class Survey:
    """The settings that are worth a trial on a program, and the knobs that are not.

    Attributes:
        candidates: the candidates, the most promising first. ``survey`` sorts them by their bounds,
            and ``prediction.sort_out`` then sorts them by ``Candidate.promise``.
        refused: the wanted knobs without candidates, each with the reason.
        offered: for each knob, the settings that make sense for the program.
        findings: the findings about what limits the bare program.
    """

    candidates: tuple[Candidate, ...]
    refused: dict[str, str]
    offered: Mapping[str, Sequence[str]]
    findings: list[Finding]


def survey(
    process: ProcessRecord,
    ceilings: Ceilings | None,
    wanted: Collection[str] | None,
    exactness: Collection[Exactness] | None,
    allowed_memory: float = memory.ALLOWED,
) -> Survey:
    """Find the settings that are worth a trial.

    Args:
        process: the record of a bare run.
        ceilings: the machine's peak rates; ``None`` if they were not measured.
        wanted: the names of the knobs that may be tried; ``None`` for all.
        exactness: the exactness classes of the settings that may be tried; ``None`` for all.
        allowed_memory: the peak memory that a plan may have, as a multiple of the bare program's.
    """
    case = Case(process, ceilings, machine.usable_cores())
    facts = collect_facts(case, allowed_memory)
    found, refused = find(facts, wanted, exactness)
    return Survey(
        candidates=tuple(found),
        refused=refused,
        offered={name: knob.offer(facts).settings for name, knob in knobs.registry().items()},
        findings=find_all(case),
    )


def collect_facts(case: Case, allowed_memory: float = memory.ALLOWED) -> Facts:
    """Collect the first run's measurements in the form that ``Knob.offer`` takes.

    Args:
        case: the first run. Without ceilings, the matmul rates count as not measured.
        allowed_memory: the peak memory that a plan may have, as a multiple of the first run's.
    """
    peak_bytes = memory.peak_rss_bytes([case.steps])
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
        has_optimizer_steps=any(step.updates for step in case.steps),
        optimizers=None if optimizers is None else len(optimizers),
        huge_pages=machine.huge_pages(),
        threads=case.process.threads,
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
        step_ms=case.mean_step_ms if phases else None,
        module_share=case.phase_share("forward", "backward") if phases else None,
        calls_modules=any(step.forwards for step in case.steps),
        is_distributed=case.process.header.world_size is not None or case.facts.is_distributed,
        isolation_refusal=isolation.unavailable_reason(),
        spare_memory_bytes=None if peak_bytes is None else (allowed_memory - 1) * peak_bytes,
    )


def find(
    known: Facts, wanted: Collection[str] | None, exactness: Collection[Exactness] | None
) -> tuple[list[Candidate], dict[str, str]]:
    """Find the candidates, and the wanted knobs that have none.

    Args:
        known: the facts about the job.
        wanted: the names of the knobs that may be tried; ``None`` for all.
        exactness: the exactness classes of the settings that may be tried; ``None`` for all.

    Returns the candidates, the one with the largest bound first, and for each wanted knob without
    candidates the reason why it has none.
    """
    shares: dict[Candidate, float] = {}
    refused: dict[str, str] = {}
    for name, knob in knobs.registry().items():
        if wanted is not None and name not in wanted:
            continue
        if known.operators is None and set(knob.replaces) - {OPTIMIZER_STEP}:
            refused[name] = "it replaces operators, and this program's operators were not profiled"
            continue
        match = knob.offer(known)
        allowed = [s for s in match.settings if exactness is None or knob.exactness[s] in exactness]
        if not match.settings:
            refused[name] = match.refusal or "it does not apply"
        elif not allowed:
            refused[name] = "its settings are of a class that --exactness excludes"
        elif match.share is not None and match.share < HOPELESS_SHARE:
            refused[name] = (
                f"it can speed up only {match.share:.1%} of a step, a gain of at most "
                f"{match.bound:.3f}x"
            )
        else:
            share = UNKNOWN_SHARE if match.share is None else match.share
            is_hot = knob.hot and not knob.slow_start
            for setting in allowed[: 2 if share >= ALTERNATIVES_SHARE else 1]:
                shares[Candidate(name, setting, is_hot, match.bound)] = share
    return sorted(shares, key=lambda candidate: -shares[candidate]), refused


def find_second_looks(
    ratios: Mapping[Candidate, Ratio | None], settings: Mapping[str, str]
) -> dict[str, str]:
    """Find settings that had no clear gain on the bare program, but may have one on the stack.

    The work that such a setting speeds up took a small share of the bare step. In the stack's
    shorter step, the same work takes a larger share. Two knobs that claim the same part of the
    program (``Knob.claims``) exclude each other. A setting is left out if its knob and
    a knob of the stack exclude each other.

    Args:
        ratios: the measured speedup of each candidate; ``None`` if it was not measured.
        settings: the settings of the stack, which were faster than the bare program.

    Returns the settings, the most promising first.
    """
    taken = {claim for knob in settings for claim in (knob, *knobs.get(knob).claims)}
    faster = math.prod(
        ratio.value
        for candidate, ratio in ratios.items()
        if ratio is not None and settings.get(candidate.knob) == candidate.setting
    )
    if faster < SECOND_LOOK_SPEEDUP:
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
        claims = {candidate.knob, *knobs.get(candidate.knob).claims}
        if len(found) < SECOND_LOOKS and not claims & taken:
            found[candidate.knob] = candidate.setting
            taken |= claims
    return found
