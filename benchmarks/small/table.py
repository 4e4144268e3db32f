"""What the results say: ratios over bare, the best right peer and JAX, and the targets."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.outside import Results
from benchmarks.small.cases import ARMS, CASES
from benchmarks.suite.cases import ROOT
from benchmarks.suite.table import estimate, geometric_mean, in_table, wrong
from flatout.wire.ratios import Ratio

OVER_BARE, OVER_PEER, LEAST_OVER_BARE = 3.0, 1.5, 1.0
"""The targets: geometric means over all programs, and the least of a single one."""

OVER_JAX = 1.5
"""The target: flatout's step takes at most this many times that of JAX."""

TUNE_S = 60.0
"""The target: a tune takes at most this many seconds."""

MEASURED = ROOT / "benchmarks" / "small" / "measured.jsonl"
PAGE = ROOT / "docs" / "small.md"

HEAD = """# Small steps

Half of all PyTorch programs never reach a matrix product that matters: their steps take 0.3 to
10 ms, most of it in Python, the dispatcher and autograd. This page shows what flatout does for ten
of them, beside what their users can do by hand. `make small` measures it: all arms of a program run
at the same time, in turns, and are timed from outside; the ratios are of step times, with 95 %
intervals. The best right peer is the fastest of the arms whose losses are bare's, chosen on every
other round and compared on the others. JAX trains the same network on data of the same kind, with
one jitted step.

"""


@dataclass(frozen=True)
class Found:
    """What came out for one program.

    Attributes:
        ratios: the step time of bare over that of each arm.
        wrong: why the results of an arm are not bare's, for those of which they are not.
        best_peer: the fastest right arm but flatout and JAX; ``None``: there is none.
        over_peer: its step time over flatout's.
        over_jax: flatout's step time over JAX's; ``None``: there is no JAX program.
        bare_ms: the step time of bare.
        tune: what the tune came to.
        failures: why an arm does not work, for those that do not.
    """

    ratios: Mapping[str, Ratio]
    wrong: Mapping[str, str]
    best_peer: str | None
    over_peer: Ratio | None
    over_jax: Ratio | None
    bare_ms: float
    tune: Mapping[str, Any]
    failures: Mapping[str, str]


def judged(name: str, results: Results) -> Found | None:
    """What came out for a program; ``None``: it has fewer than two rounds."""
    rounds = [line["arms"] for line in results.of(name, "round")]
    if len(rounds) < 2:
        return None
    arms = sorted(set.intersection(*(set(line) for line in rounds)))
    own = {arm: [line[arm] for line in rounds] for arm in arms}
    trains = not CASES[name].is_inference
    lasts = {arm: [one["last"] for one in own[arm]] for arm in arms}
    faults = {arm: wrong(lasts["bare"], lasts[arm], trains) for arm in arms if arm != "jax"}
    peers = [arm for arm in arms if arm in ARMS and arm != "bare" and faults[arm] is None]

    def log_time(arm: str) -> float:
        return sum(math.log(one["step_s"]) for one in own[arm][::2])

    best = min(peers, key=log_time, default=None)
    has_flatout = "flatout" in arms
    return Found(
        ratios={arm: estimate(own["bare"], own[arm]) for arm in arms if arm != "bare"},
        wrong={arm: why for arm, why in faults.items() if why is not None},
        best_peer=best,
        over_peer=estimate(own[best][1::2], own["flatout"][1::2]) if best and has_flatout else None,
        over_jax=estimate(own["flatout"], own["jax"]) if has_flatout and "jax" in arms else None,
        bare_ms=1e3 * math.exp(sum(math.log(b["step_s"]) for b in own["bare"]) / len(rounds)),
        tune=next(iter(results.of(name, "tune")[-1:]), {}),
        failures={
            line["arm"]: line["failure"] for line in results.of(name, "first") if line["failure"]
        },
    )


def _all(results: Results) -> dict[str, Found]:
    found = {name: judged(name, results) for name in CASES}
    return {name: one for name, one in found.items() if one is not None}


def missed(results: Results, asked_for: Collection[str]) -> list[str]:
    """The targets that are missed; those for all programs only where all are asked for."""
    found = _all(results)
    says = [f"{name}: not measured" for name in asked_for if name not in found]
    for name in (name for name in asked_for if name in found):
        one = found[name]
        own = one.ratios.get("flatout")
        if own is None:
            says.append(f"{name}: flatout: {one.failures.get('flatout', 'not measured')}")
            continue
        if own.value < LEAST_OVER_BARE:
            says.append(f"{name}: {own.value:.2f}x over bare, asked: {LEAST_OVER_BARE}x")
        if "flatout" in one.wrong:
            says.append(f"{name}: flatout is wrong: {one.wrong['flatout']}")
        if one.over_jax is not None and one.over_jax.value > OVER_JAX:
            says.append(f"{name}: {one.over_jax.value:.2f} times JAX's step, asked: {OVER_JAX}")
        if one.tune.get("seconds", 0.0) > TUNE_S:
            says.append(f"{name}: its tune took {one.tune['seconds']:.0f} s, asked: {TUNE_S:.0f} s")
    if set(asked_for) == set(CASES):
        over_bare, over_peer = _means(found.values())
        if over_bare is not None and over_bare < OVER_BARE:
            says.append(f"geometric mean {over_bare:.2f}x over bare, asked: {OVER_BARE}x")
        if over_peer is not None and over_peer < OVER_PEER:
            says.append(f"geometric mean {over_peer:.2f}x over the best peers, asked: {OVER_PEER}x")
    return says


def _means(found: Collection[Found]) -> tuple[float | None, float | None]:
    return (
        geometric_mean(one.ratios["flatout"].value for one in found if "flatout" in one.ratios),
        geometric_mean(one.over_peer.value for one in found if one.over_peer is not None),
    )


def markdown(results: Results) -> str:
    """The tables."""
    found = _all(results)
    lines = [
        "| program | bare | flatout over bare | best right peer | flatout over it | JAX over bare "
        "| tune | plan |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        plan = " ".join(f"{knob}={value}" for knob, value in one.tune.get("settings", {}).items())
        tuned_s = one.tune.get("seconds")
        lines.append(
            f"| {name} | {one.bare_ms:.3g} ms | {_cell(one.ratios.get('flatout'))} "
            f"| {one.best_peer or 'none'} | {_cell(one.over_peer)} "
            f"| {_cell(one.ratios.get('jax')) if 'jax' in one.ratios else ''} "
            f"| {'not measured' if tuned_s is None else f'{tuned_s:.0f} s'} | {plan or 'none'} |"
        )
    over_bare, over_peer = _means(found.values())
    if over_bare is not None and over_peer is not None:
        lines += [
            "",
            f"Geometric means over {len(found)} programs: **{over_bare:.2f}x** over bare, ",
        ]
        lines[-1] += f"**{over_peer:.2f}x** over the best right peer of each."
    lines += ["", *_arm_lines(found)]
    return "\n".join(lines) + "\n"


def _arm_lines(found: Mapping[str, Found]) -> Sequence[str]:
    """The table of all arms, each over bare."""
    lines = [f"| program | {' | '.join(list(ARMS)[1:])} |", "| --- " * len(ARMS) + "|"]
    for name, one in found.items():
        cells = []
        for arm in list(ARMS)[1:]:
            cell = _cell(one.ratios.get(arm)) if arm in one.ratios else ""
            if arm in one.failures:
                cell = "fails"
            cells.append(f"**broken**, {cell}" if arm in one.wrong else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"- {arm}: {how.what}" for arm, how in ARMS.items() if arm != "bare")]
    return lines


def _cell(ratio: Ratio | None) -> str:
    return "not measured" if ratio is None else in_table(ratio)


def publish(results: Results) -> None:
    """Write the figures and the page into the repository."""
    lines = (json.dumps(line) for line in results.lines)
    text = "".join(f"{line}\n" for line in lines).replace(f"{ROOT}/", "")
    MEASURED.write_text(text, "utf-8")
    says = missed(results, CASES)
    targets = "".join(f"- missed: {what}\n" for what in says)
    PAGE.write_text(
        f"{HEAD}{markdown(results)}\n## Targets\n\n{targets or 'All are met.'}", "utf-8"
    )
