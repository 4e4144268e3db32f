"""Recorded pairs of runs beside other work, replayed through the decisions of ``flatout tune``.

``record_beside.py`` has recorded of each program what bare runs take against bare runs, against a
setting that gains, and against ``threads=one``: quiet, and beside other work of several kinds. A
replay draws pairs from the blocks of one kind of work (or from all of them, ``mixed``): first those
of the trial of a candidate, then those of the proof, each until the rules of ``flatout tune`` say
that there are enough. A gain is claimed if the trial finds the setting faster and the proof shows a
gain. What the same blocks take while the machine is quiet is the truth. ``replay.py`` runs this,
and says what is asked of it.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from flatout.tune import quiet, statistics
from flatout.tune.prover import MAXIMUM_PAIRS
from flatout.tune.quiet import Block
from flatout.wire.disturbance import History
from flatout.wire.lines import CpuUsage
from flatout.wire.ratios import Ratio
from flatout.wire.record import UsageBeside

RECORDED = Path(__file__).parent / "beside"

WORK = ("quiet", "steady", "tests", "idle", "bursts", "mixed")
"""Kinds of other work; ``mixed`` is all that was recorded, in its order."""

KINDS = ("same", "gaining", "threads")

PAIR_BLOCKS = 8
"""The blocks of a pair, see ``pairs.FEWEST_RELAY_BLOCKS``."""


@dataclass(frozen=True)
class Recorded:
    """A pair of runs.

    Attributes:
        settings: of the variant.
        blocks: the blocks in their order.
        work: for each block, the kind of other work; empty: there were several.
    """

    settings: dict[str, str]
    blocks: list[Block]
    work: list[str]

    def beside(self, work: str) -> list[Block]:
        """Return the blocks beside a kind of work, in their order."""
        return [
            b for b, kind in zip(self.blocks, self.work, strict=True) if work in (kind, "mixed")
        ]

    @property
    def truth(self) -> float:
        """The ratio of the quiet blocks; exactly 1 for the same settings on both sides."""
        counted = [block for block in self.beside("quiet") if block.counts(needs_quiet=True)]
        return math.exp(quiet.log_ratio(counted)) if self.settings else 1.0


class Outcome(NamedTuple):
    """Of one replay.

    Attributes:
        ratio: what the proof measured; ``None``: it was not measurable.
        is_tried: whether a trial before it would have found the setting faster.
    """

    ratio: Ratio | None
    is_tried: bool

    @property
    def is_claimed(self) -> bool:
        """Whether a gain is claimed."""
        return self.is_tried and self.ratio is not None and statistics.is_gain(self.ratio)


def recorded_programs() -> list[str]:
    """Names of the programs that were recorded."""
    return sorted(path.name.removesuffix(".json.gz") for path in RECORDED.glob("*.json.gz"))


def load(name: str) -> dict[str, Recorded]:
    """Read the recorded pairs of a program, by kind."""
    document = json.loads(gzip.decompress((RECORDED / f"{name}.json.gz").read_bytes()))
    return {kind: _recorded(document[kind]) for kind in KINDS}


def _recorded(pair: dict[str, Any]) -> Recorded:
    usages = [_usage(run["usage"]) for run in pair["runs"]]
    shifts = [run["shift_s"] for run in pair["runs"]]
    histories = [
        History(usages[own], [UsageBeside(shifts[1 - own] - shifts[own], usages[1 - own])])
        for own in (0, 1)
    ]
    blocks, work = [], []
    for number, spans in enumerate(zip(*(run["blocks_s"] for run in pair["runs"]), strict=False)):
        (baseline_s, one), (variant_s, other) = (
            (end_s - start_s, history.between(start_s, end_s))
            for history, (start_s, end_s) in zip(histories, spans, strict=True)
        )
        blocks.append(Block((number, number + 1), baseline_s, variant_s, one, other))
        active = [
            (start_s + shift_s, end_s + shift_s)
            for (start_s, end_s), shift_s in zip(spans, shifts, strict=True)
        ]
        work.append(_find_work(pair["work"], active))
    return Recorded(pair["settings"], blocks, work)


def _usage(columns: dict[str, Any]) -> list[CpuUsage]:
    count = len(columns["at_s"]["steps"]) + 1
    values = {key: _unpacked(column, count) for key, column in columns.items()}
    return [CpuUsage(**{key: column[at] for key, column in values.items()}) for at in range(count)]


def _unpacked(column: Any, count: int) -> list[Any]:
    if isinstance(column, dict):
        return [units / 1e5 for units in accumulate([column["first"], *column["steps"]])]
    return column if isinstance(column, list) else [column] * count


def _find_work(work: list[tuple[str, float]], active: Sequence[tuple[float, float]]) -> str:
    """Return the kind of other work for most of the time in which a block was active.

    Beside other work a block may outlast it. A block is quiet only if there was none at all.
    """
    beside_s = dict.fromkeys(WORK, 0.0)
    for (kind, begins_s), (_, ends_s) in pairwise(work):
        for start_s, end_s in active:
            beside_s[kind] += max(min(end_s, ends_s) - max(start_s, begins_s), 0.0)
    kind = max(beside_s, key=lambda one: beside_s[one])
    share = beside_s[kind] / sum(end_s - start_s for start_s, end_s in active)
    return kind if share > (0.999 if kind == "quiet" else 0.5) else ""


def replay(recorded: Recorded, work: str, seeds: Iterable[int]) -> list[Outcome]:
    """Replay the claim of a pair's settings beside a kind of work, once for each seed; not at all
    if no block was recorded beside it."""
    blocks = recorded.beside(work)
    if not blocks:
        return []
    settings = recorded.settings
    draws = (random.Random(seed) for seed in seeds)
    return [Outcome(prove(settings, blocks, d), try_out(settings, blocks, d)) for d in draws]


def try_out(settings: dict[str, str], blocks: Sequence[Block], draw: random.Random) -> bool:
    """Draw pairs as ``cold.py`` does, and return whether the settings seem faster."""
    needs_quiet = quiet.needs_quiet({}, settings)
    most = statistics.MAXIMUM_RANKING_PAIRS + quiet.FEWEST_COUNTED
    pairs: list[list[Block]] = []
    while len(pairs) < most:
        pairs.append(_draw_pair(blocks, draw, can_swap=not settings))
        logs = [quiet.log_ratio(kept) for kept in quiet.counted_pairs(pairs, needs_quiet)]
        if len(logs) >= statistics.RANKING_PAIRS and statistics.is_ranked(logs):
            break
    is_measurable = quiet.assess(pairs, needs_quiet).why_too_few is None
    return is_measurable and statistics.is_probably_faster(logs)


def prove(settings: dict[str, str], blocks: Sequence[Block], draw: random.Random) -> Ratio | None:
    """Draw pairs as ``prover.py`` does; return the ratio, or ``None`` if it is not measurable."""
    needs_quiet = quiet.needs_quiet({}, settings)
    pairs: list[list[Block]] = []
    while True:
        pairs.append(_draw_pair(blocks, draw, can_swap=not settings))
        counted = quiet.counted_pairs(pairs, needs_quiet)
        logs = [quiet.log_ratio(kept) for kept in counted]
        if len(pairs) < statistics.MINIMUM_PAIRS:
            continue
        quietness = quiet.assess(pairs, needs_quiet)
        if quiet.is_enough(quietness, logs, MAXIMUM_PAIRS):
            break
    return None if quietness.why_not_measurable else statistics.estimate_ratio(logs)


def _draw_pair(blocks: Sequence[Block], draw: random.Random, can_swap: bool) -> list[Block]:
    """Consecutive blocks from a random place on, going on at the first after the last.

    Where both sides have the same settings, they may change places.
    """
    first = draw.randrange(len(blocks))
    swaps = can_swap and draw.random() < 0.5
    drawn = []
    for number in range(PAIR_BLOCKS):
        block = blocks[(first + number) % len(blocks)]
        sides = [(block.baseline_s, block.baseline), (block.variant_s, block.variant)]
        (baseline_s, baseline), (variant_s, variant) = sides[::-1] if swaps else sides
        drawn.append(Block((number, number + 1), baseline_s, variant_s, baseline, variant))
    return drawn


class Tally(NamedTuple):
    """Of the replays of one kind beside one kind of work: the number of all, of those with a ratio,
    of ratios whose interval holds the truth, and of claimed gains."""

    replays: int
    measured: int
    holds: int
    gains: int

    @classmethod
    def of(cls, recorded: Recorded, outcomes: Sequence[Outcome]) -> Tally:
        """Count outcomes."""
        ratios = [outcome.ratio for outcome in outcomes if outcome.ratio is not None]
        return cls(
            len(outcomes),
            len(ratios),
            sum(ratio.low <= recorded.truth <= ratio.high for ratio in ratios),
            sum(outcome.is_claimed for outcome in outcomes),
        )


def tally(name: str, kind: str, work: str, seeds: Sequence[int]) -> Tally:
    """Replay a pair of a program beside a kind of work, and count."""
    recorded = load(name)[kind]
    return Tally.of(recorded, replay(recorded, work, seeds))
