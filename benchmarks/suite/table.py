"""What the suite's results say: ratios, which losses are right, shares of the floor, targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.outside import Results
from benchmarks.suite import arms
from benchmarks.suite.cases import CASES, Case
from flatout.tune.statistics import estimate_ratio
from flatout.wire.ratios import Ratio

OPTIMIZER_BYTES = {"SGD": 20, "Adam": 28, "AdamW": 28, "RMSprop": 20}
"""Bytes an element that a step must read and write in float32: the gradient once, the parameter and
each of its states twice."""

RIGHT_MARGIN = 0.02
"""Of the bare figure: what an output may differ by; for losses the spread between seeds counts as
well, where it is larger."""

GEOMETRIC_MEAN_OVER_BARE, LEAST_OVER_BARE = 3.0, 1.0
GEOMETRIC_MEAN_OVER_PEER, LEAST_OVER_PEER = 1.3, 0.98
SHARE_OF_CEILING = 0.4
INFERENCE_OVER_BARE, INFERENCE_OVER_PEER = 2.5, 0.9

WAITS = 0.1
LARGEST = 3
"""Of a step that misses a target, what is told: a share of waiting, so many operators."""


@dataclass(frozen=True)
class Floor:
    """What the machine needs at least for a bare step's work.

    Attributes:
        compute_ms: its FLOPs at the measured bfloat16 rate.
        optimizer_ms: what its optimizers read and write at the measured rate of copies.
    """

    compute_ms: float
    optimizer_ms: float

    @property
    def ms(self) -> float:
        return self.compute_ms + self.optimizer_ms


@dataclass(frozen=True)
class ArmResult:
    """What came out of one arm of one program.

    Attributes:
        step_ms: mean of a round's steps, median of the rounds.
        ratio: bare's step time over this.
        job_ratio: bare's whole time over this, start and end included.
        first_s: its first run alone, compilation and filling of caches included.
        peak_bytes: largest process.
        wrong: why its results are not bare's, ``None``: they are.
    """

    step_ms: float
    ratio: Ratio
    job_ratio: float
    first_s: float | None
    peak_bytes: int
    wrong: str | None


@dataclass(frozen=True)
class ProgramResult:
    """What came out of one program.

    Attributes:
        rounds: behind each figure.
        arms: by name.
        out: arms that it has not, and why.
        floor: ``None``: its FLOPs are not known.
        settings: of flatout's plan.
        tuning_s: seconds that the tune took.
        claim: of the tune, bare's step time over the plan's; ``None``: it claims nothing.
        best_peer: the fastest right one on every other round; ``None``: there is none.
        over_peer: its step time over flatout's, on the other rounds.
        commit: of flatout; ``None``: not known.
        rest: what takes the time of flatout's step, see ``measure.py``; ``None``: not measured.
    """

    rounds: int
    arms: Mapping[str, ArmResult]
    out: Mapping[str, str]
    floor: Floor | None
    settings: Mapping[str, str]
    tuning_s: float | None
    claim: Ratio | None
    best_peer: str | None
    over_peer: Ratio | None
    commit: str | None
    rest: Mapping[str, Any] | None


def judged(name: str, results: Results) -> ProgramResult | None:
    """The result of a program, ``None`` as long as it has fewer than two rounds."""
    rounds = results.of(name, "round")
    if len(rounds) < 2:
        return None
    firsts = {line["arm"]: line for line in results.of(name, "first")}
    out = {line["arm"]: line["why"] for line in results.of(name, "not applicable")}
    out |= {arm: f"fails: {line['failure']}" for arm, line in firsts.items() if line["failure"]}
    common = set.intersection(*(set(line["arms"]) for line in rounds))
    found = {arm: _arm(arm, rounds, firsts, CASES[name]) for arm in sorted(common)}
    tunes = results.of(name, "tune")
    tune = tunes[-1] if tunes else {}
    settings = tune.get("settings", {})
    best, over = None, None
    if "flatout" in found:
        best, over = _against_peers(rounds, found, CASES[name], "precision" in settings)
    return ProgramResult(
        rounds=len(rounds),
        arms=found,
        out=out,
        floor=_floor(results.of(name, "floor")),
        settings=settings,
        tuning_s=tune.get("seconds"),
        claim=Ratio(**tune["claim"]) if tune.get("claim") else None,
        best_peer=best,
        over_peer=over,
        commit=next((line.get("commit") for line in results.of(name, "floor")[-1:]), None),
        rest=next(iter(results.of(name, "rest")[-1:]), None),
    )


def _arm(
    arm: str, rounds: Sequence[Mapping[str, Any]], firsts: Mapping[str, Any], case: Case
) -> ArmResult:
    bare = [line["arms"]["bare"] for line in rounds]
    own = [line["arms"][arm] for line in rounds]
    return ArmResult(
        step_ms=1e3 * statistics.median(one["step_s"] for one in own),
        ratio=estimate(bare, own),
        job_ratio=math.exp(
            statistics.mean(
                math.log(b["ran_s"] / o["ran_s"]) for b, o in zip(bare, own, strict=True)
            )
        ),
        first_s=firsts[arm]["ran_s"] if arm in firsts else None,
        peak_bytes=max(one["peak_bytes"] for one in own),
        wrong=wrong([b["last"] for b in bare], [o["last"] for o in own], case.kind == "training"),
    )


def estimate(bare: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]]) -> Ratio:
    """The step times of bare over those of an arm, in the same rounds."""
    logs = [math.log(b["step_s"] / o["step_s"]) for b, o in zip(bare, own, strict=True)]
    if len(logs) > 1:
        return estimate_ratio(logs)
    return Ratio(math.exp(logs[0]), 0.0, math.inf, 1)


def wrong(
    bare: Sequence[Sequence[float]], own: Sequence[Sequence[float]], trains: bool
) -> str | None:
    """Why the figures that an arm prints are not those of bare, ``None``: they are.

    Outputs must agree to ``RIGHT_MARGIN`` of the largest. A loss is wrong when it is worse by more
    than bare's spread between seeds, and certainly worse: by twice the standard error of the mean.

    Args:
        bare: for each round, what the program printed at the end, figure by figure.
        own: the same of the arm, with the same seeds.
        trains: the figures are losses.
    """
    if any(not math.isfinite(figure) for line in own for figure in line):
        return "not finite"
    largest = max(abs(figure) for line in bare for figure in line)
    for base, figures in zip(zip(*bare, strict=True), zip(*own, strict=True), strict=True):
        differences = [f - b for f, b in zip(figures, base, strict=True)]
        if not trains:
            if max(map(abs, differences)) > RIGHT_MARGIN * largest:
                return f"prints {figures[-1]:.4g} instead of {base[-1]:.4g}"
            continue
        mean = statistics.mean(differences)
        margin = RIGHT_MARGIN * abs(statistics.mean(base))
        error = statistics.stdev(differences) / math.sqrt(len(differences))
        if mean - 2 * error > 0 and mean > max(margin, statistics.stdev(base)):
            return f"loss {statistics.mean(figures):.4g} instead of {statistics.mean(base):.4g}"
    return None


def _against_peers(
    rounds: Sequence[Mapping[str, Any]],
    found: Mapping[str, ArmResult],
    case: Case,
    is_reduced: bool,
) -> tuple[str | None, Ratio | None]:
    """The best peer, chosen on the even rounds, and how flatout does against it on the odd ones."""
    peers = [
        arm
        for arm, result in found.items()
        if arm not in ("bare", "flatout")
        and result.wrong is None
        and (case.kind == "training" or is_reduced or not arms.ARMS[arm].is_reduced)
    ]
    if not peers:
        return None, None

    def total(arm: str) -> float:
        return sum(math.log(line["arms"][arm]["step_s"]) for line in rounds[::2])

    best = min(peers, key=total)
    scored = [line["arms"] for line in rounds[1::2]]
    return best, estimate([line[best] for line in scored], [line["flatout"] for line in scored])


def _floor(lines: Sequence[Mapping[str, Any]]) -> Floor | None:
    if not lines:
        return None
    machine, flops = lines[-1]["machine"], lines[-1]["diagnosis"]["flops_per_step"]
    rate = machine["matmul_flops_per_s"].get("bfloat16")
    if not flops or not rate or not machine["memory_bytes_per_s"]:
        return None
    moved = sum(OPTIMIZER_BYTES[o["class"]] * o["elements"] for o in lines[-1]["optimizers"])
    return Floor(1e3 * flops / rate, 1e3 * moved / machine["memory_bytes_per_s"])


# The targets


def missed(found: Mapping[str, ProgramResult], asked_for: Collection[str] = CASES) -> list[str]:
    """The targets that are missed, and the programs asked for that lack their measurement; means
    are held against theirs where all programs are asked for."""
    says = [f"{name}: not measured" for name in asked_for if name not in found]
    with_flatout = {name: r for name, r in found.items() if "flatout" in r.arms}
    for kind, over_bare, over_peer in (
        ("training", LEAST_OVER_BARE, LEAST_OVER_PEER),
        ("inference", INFERENCE_OVER_BARE, INFERENCE_OVER_PEER),
    ):
        for name, result in with_flatout.items():
            if CASES[name].kind != kind:
                continue
            own, missing = result.arms["flatout"], []
            if own.wrong is not None:
                missing.append(f"flatout is wrong: {own.wrong}")
            if own.ratio.value < over_bare:
                missing.append(f"{own.ratio.value:.2f}x over bare, asked: {over_bare}x")
            if result.over_peer is not None and result.over_peer.value < over_peer:
                missing.append(
                    f"{result.over_peer.value:.2f}x over {result.best_peer}, asked: {over_peer}x"
                )
            if CASES[name].is_compute_bound and result.floor is not None:
                share = result.floor.compute_ms / own.step_ms
                if share < SHARE_OF_CEILING:
                    missing.append(
                        f"{share:.0%} of the bf16 ceiling, asked: {SHARE_OF_CEILING:.0%}"
                    )
            says += [f"{name}: {what}{_why(result)}" for what in missing]
    for name, result in found.items():
        if name not in with_flatout:
            says.append(f"{name}: flatout: {result.out.get('flatout', 'not measured')}")
    if not {*asked_for} < {*CASES}:
        says += _means_missed(
            [r for name, r in with_flatout.items() if CASES[name].kind == "training"]
        )
    return says


def _means_missed(training: Sequence[ProgramResult]) -> list[str]:
    """The targets for all training programs together that are missed."""
    over_bare = geometric_mean(r.arms["flatout"].ratio.value for r in training)
    over_peers = geometric_mean(r.over_peer.value for r in training if r.over_peer)
    says = []
    if over_bare is not None and over_bare < GEOMETRIC_MEAN_OVER_BARE:
        limit = geometric_mean(
            r.arms["bare"].step_ms / r.floor.ms for r in training if r.floor and "bare" in r.arms
        )
        why = "" if limit is None else f" (with every step at its floor it would be {limit:.2f}x)"
        says.append(
            f"training over bare: geometric mean {over_bare:.2f}x, asked: "
            f"{GEOMETRIC_MEAN_OVER_BARE}x{why}"
        )
    if over_peers is not None and over_peers < GEOMETRIC_MEAN_OVER_PEER:
        says.append(
            f"training over the best peers: geometric mean {over_peers:.2f}x, asked: "
            f"{GEOMETRIC_MEAN_OVER_PEER}x"
        )
    return says


def _why(result: ProgramResult) -> str:
    """What flatout's step is made of, beside its floor, to be put behind a target missed."""
    parts = []
    if result.floor is not None:
        own_ms = result.arms["flatout"].step_ms
        parts.append(f"a step takes {own_ms:.4g} ms, its floor is {result.floor.ms:.3g} ms")
    if result.rest is not None:
        if result.rest["data_share"] > WAITS:
            parts.append(f"{result.rest['data_share']:.0%} of it waits for data")
        largest = sorted(result.rest["operators"], key=lambda o: -o["share"])[:LARGEST]
        parts.append(", ".join(f"{o['name']} {o['share']:.0%}" for o in largest))
    return f" ({'; '.join(parts)})" if parts else ""


def geometric_mean(values: Iterator[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(statistics.mean(logs)) if logs else None


# Markdown


def conditions(results: Results) -> list[str]:
    """The machine, and the versions of what was measured, as the results have them."""
    floors = [line for line in results.lines if line["kind"] == "floor"]
    if not floors:
        return []
    machine = floors[-1]["machine"]
    rates = ", ".join(
        f"{rate / 1e9:.0f} GFLOP/s in {dtype}"
        for dtype, rate in machine["matmul_flops_per_s"].items()
        if rate is not None and dtype in ("float32", "bfloat16")
    )
    peers = ", ".join(sorted({p for line in floors for p in line["peers"]}))
    return [
        f"{machine['cpu']}, {machine['usable_cores']:g} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; matrix products at {rates}, copies at "
        f"{machine['memory_bytes_per_s'] / 1e9:.0f} GB/s, both measured. torch "
        f"{machine['torch']}; {peers}.",
        "",
    ]


def short(found: Mapping[str, ProgramResult]) -> str:
    """One row a program, and the means, for the page of benchmarks."""
    lines = [
        "| program | flatout | best peer | flatout over it | of the limit |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, result in found.items():
        if "flatout" not in result.arms:
            continue
        own, best = result.arms["flatout"], result.best_peer
        peer = f"{in_table(result.arms[best].ratio)} {best}" if best else "none"
        over = in_table(result.over_peer) if result.over_peer else ""
        what = f"{name}, {CASES[name].kind}" if CASES[name].kind != "training" else name
        lines.append(
            f"| {what} | {in_table(own.ratio)} | {peer} | {over} | {_floor_share(result)} |"
        )
    return "\n".join([*lines, *_means(found)])


def _floor_share(result: ProgramResult) -> str:
    if result.floor is None:
        return "not known"
    return f"{result.floor.ms / result.arms['flatout'].step_ms:.0%}"


class Overall(NamedTuple):
    """Geometric means over the training programs.

    Attributes:
        programs: how many they are.
        over_bare: bare's step time over flatout's.
        over_peer: that of the best right peer of each.
    """

    programs: int
    over_bare: float
    over_peer: float


def overall(found: Mapping[str, ProgramResult]) -> Overall | None:
    """The figures for all training programs together; ``None``: there are too few results."""
    training = [r for n, r in found.items() if CASES[n].kind == "training" and "flatout" in r.arms]
    over_bare = geometric_mean(r.arms["flatout"].ratio.value for r in training)
    over_peer = geometric_mean(r.over_peer.value for r in training if r.over_peer)
    if over_bare is None or over_peer is None:
        return None
    return Overall(len(training), over_bare, over_peer)


def _means(found: Mapping[str, ProgramResult]) -> list[str]:
    means = overall(found)
    if means is None:
        return []
    return [
        "",
        f"Geometric means over {means.programs} training programs: **{means.over_bare:.2f}x** over "
        f"bare, **{means.over_peer:.2f}x** over the best right peer of each.",
    ]


def markdown(found: Mapping[str, ProgramResult]) -> list[str]:
    """The tables: all programs, then each with its arms."""
    lines = [
        "Ratios of step times with 95 % intervals. The best right peer is the fastest whose "
        "results are bare's (for inference, in at most flatout's precision), chosen on every other "
        "round and compared on the others; the floor is the bare step's FLOPs at the bf16 rate and "
        "the optimizer's memory at the rate of copies.",
        "",
        "| program | flatout over bare | claimed by tune | best right peer | flatout over it "
        "| share of the floor | tune | plan |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, result in found.items():
        own = result.arms.get("flatout")
        if own is None:
            continue
        plan = " ".join(f"{knob}={setting}" for knob, setting in result.settings.items())
        held_out = " (held out)" if CASES[name].is_held_out else ""
        lines.append(
            f"| {name}{held_out} | {in_table(own.ratio)} "
            f"| {in_table(result.claim) if result.claim else ''} | {result.best_peer or 'none'} "
            f"| {in_table(result.over_peer) if result.over_peer else ''} | {_floor_share(result)} "
            f"| {result.tuning_s or 0:.0f} s | {plan or 'none'} |"
        )
    lines += _means(found)
    for name, result in found.items():
        lines += ["", *_program(name, result)]
    return lines


def _program(name: str, result: ProgramResult) -> list[str]:
    floor = "not known"
    if result.floor is not None:
        floor = (
            f"{result.floor.ms:.3g} ms ({result.floor.compute_ms:.3g} ms of bf16 arithmetic, "
            f"{result.floor.optimizer_ms:.3g} ms of the optimizer's memory)"
        )
    lines = [
        f"### {name}",
        "",
        f"{result.rounds} rounds; flatout of commit {result.commit or 'not known'}; floor of a "
        f"step: {floor}.",
        "",
        *([said, ""] if (said := rest(result)) else []),
        "| arm | ms a step | over bare | share of the floor | whole job | first run | peak "
        "| results |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for arm, own in sorted(result.arms.items(), key=lambda item: -item[1].ratio.value):
        share = f"{result.floor.ms / own.step_ms:.0%}" if result.floor else ""
        first = f"{own.first_s:.0f} s" if own.first_s is not None else ""
        right = "right" if own.wrong is None else f"**broken**: {own.wrong}"
        lines.append(
            f"| {arm} | {own.step_ms:.4g} | {in_table(own.ratio)} | {share} "
            f"| {own.job_ratio:.2f}x | {first} | {own.peak_bytes / 2**20:.0f} MiB | {right} |"
        )
    without = [f"{arm}: {why}" for arm, why in result.out.items()]
    return lines + (["", f"Without: {'; '.join(without)}."] if without else [])


def rest(result: ProgramResult) -> str | None:
    """What takes the time of flatout's step, in words; ``None``: it was not measured."""
    if result.rest is None:
        return None
    found = result.rest
    parts = [f"{o['name']} {o['share']:.0%}" for o in found["operators"] if o["share"] > 0.01]
    if found["operators_share"] is not None:
        parts.append(f"outside of operators {1 - found['operators_share']:.0%}")
    said = f"Of flatout's step (`flatout doctor` under the plan): {', '.join(parts)}."
    if found["data_share"] > 0.01:
        said += f" It waits for data {found['data_share']:.0%} of its time."
    return said


def in_table(ratio: Ratio) -> str:
    """A ratio with its interval, if it has one."""
    if ratio.pairs < 2:
        return f"{ratio.value:.2f}x"
    return f"{ratio.value:.2f}x ({ratio.low:.2f}-{ratio.high:.2f})"
