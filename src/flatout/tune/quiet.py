"""Decides which parts of a comparison count on a machine that other processes (*others*) use too.

The unit is a *block*: consecutive steps of one run of a pair, and the same steps of the other run.
If the two runs alternate, the two parts of a block ran directly one after the other. A block counts
if neither of its parts was disturbed (``wire/disturbance.py``). A pair counts if enough of its
blocks count. Some settings decide how many CPUs the program uses (``Knob.needs_quiet``). If such
settings are compared, a block counts only if others are known to have left the CPUs alone: while
others work, fewer threads look better than they are.

A second test looks for disturbances that the readings of CPU time do not show. For each side
(baseline and variant), the *floor* of a block is a low quantile of the times that the block took in
all pairs that count. Others can only make a block slower, so its fast times tell how long it takes
undisturbed. If the program does something at a certain step of every run, such as an evaluation,
the time that this takes is part of the floor of the block with that step. If the means show a gain
and the floors do not, nothing is claimed.

The functions are pure; ``benchmarks/replay.py`` tests them on recordings of runs that shared
the machine with other work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from flatout import knobs
from flatout.tune import statistics
from flatout.wire.disturbance import History, Stretch, drop_disturbed, is_little, mean_taken
from flatout.wire.ratios import Block as ArmBlock
from flatout.wire.ratios import Ratio
from flatout.wire.record import ProcessRecord, Step
from flatout.wire.request import Comparison

NOT_MEASURABLE = "not measurable now"
"""A reason that blames other processes begins with these words."""

BLOCK_S = 0.25
"""Minimum duration of a block if the two runs do not alternate, in seconds. It is the time between
two readings of CPU time (``writer.FLUSH_SECONDS``); see also ``disturbance.WINDOW_S``."""

COUNTED_SHARE = 0.25
"""A pair counts only if at least this share of its blocks counts."""

HARDLY_TAKEN = 0.05
"""A pair, or a comparison inside one process, counts in any case if others took at most this share
of the CPUs meanwhile: the delay that they caused is then small on the whole."""

FLOOR_QUANTILE = 0.25
"""The floor of a block is this quantile of its times."""

FLOOR_GAIN = 0.5
"""The floors should show at least this share of the gain that the means show (both as logarithms of
ratios); see ``find_contradiction``."""

FEWEST_FLOORS = 5
"""With fewer blocks than this, no ratio is computed from their floors."""


@dataclass(frozen=True)
class Block:
    """The same steps of the two runs of a pair.

    Attributes:
        positions: the index of the first of these steps in ``steady_steps`` of both runs, and one
            more than the index of the last.
        baseline_s, variant_s: the times that the two runs took for these steps, in seconds,
            including the evaluation passes before each step.
        baseline, variant: what happened on the CPUs while the two runs made these steps.
    """

    positions: tuple[int, int]
    baseline_s: float
    variant_s: float
    baseline: Stretch
    variant: Stretch

    def counts(self, needs_quiet: bool) -> bool:
        """Return whether the block counts.

        Args:
            needs_quiet: whether others must be known to have left the CPUs alone.
        """
        both = (self.baseline, self.variant)
        if needs_quiet:
            return all(stretch.is_quiet for stretch in both)
        return not any(stretch.is_disturbed for stretch in both)


@dataclass(frozen=True)
class Quietness:
    """How much others have disturbed some pairs.

    Attributes:
        pairs, counted: the number of all pairs, and the number of pairs that count.
        taken: the share of the CPUs that others took during the blocks of all pairs; ``None``: not
            measured.
        taken_from_counted: the share of the CPUs that others took during the blocks that count;
            ``None``: not measured.
        blocks_share: the number of blocks that count, as a share of all blocks.
        floors: the baseline's floors divided by the variant's; ``None``: too few blocks.
        contradiction: how the floors contradict a gain of the means, as a clause; ``None`` if they
            do not.
    """

    pairs: int
    counted: int
    taken: float | None
    taken_from_counted: float | None
    blocks_share: float
    floors: Ratio | None = None
    contradiction: str | None = None

    @property
    def why_too_few(self) -> str | None:
        """The reason why there is no ratio, as a clause, if too few pairs count; ``None`` if enough
        pairs count."""
        if self.counted >= min(FEWEST_COUNTED, self.pairs):
            return None
        return (
            f"{NOT_MEASURABLE}: {self.counted} of {self.pairs} pairs were quiet enough, and "
            f"{describe_others(self.taken)}"
        )

    @property
    def why_not_measurable(self) -> str | None:
        """Why no speedup can be claimed from these pairs, as a clause; ``None`` if one can."""
        if self.why_too_few is not None:
            return self.why_too_few
        if self.contradiction is not None:
            return f"{NOT_MEASURABLE}: {self.contradiction}, and {describe_others(self.taken)}"
        return None


FEWEST_COUNTED = 2
"""The smallest number of pairs that gives a confidence interval."""


def needs_quiet(baseline: Mapping[str, str], variant: Mapping[str, str]) -> bool:
    """Return whether comparing these settings needs CPUs that others leave alone."""
    return any(
        knobs.get(name).needs_quiet and baseline.get(name) != variant.get(name)
        for name in {*baseline, *variant}
    )


def describe_others(taken: float | None) -> str:
    """Return how much of the CPUs others took, as a clause."""
    if taken is None:
        return "it is not known how much of the CPUs others took"
    return f"others took {taken:.0%} of the CPUs that this job may use"


# Inside one process


def find_counting_blocks(process: ProcessRecord, comparison: Comparison) -> list[ArmBlock]:
    """Return the complete blocks of a comparison inside one process that count.

    These are the blocks that were not disturbed, or all complete blocks if others took hardly
    anything of the CPUs (``HARDLY_TAKEN``).
    """
    complete = statistics.find_complete_blocks(process.whole_steps, comparison)
    history = _history(process)
    taken = mean_taken(complete, history)
    if taken is not None and taken <= HARDLY_TAKEN:
        return complete
    return drop_disturbed(complete, history)


def why_not_compared(process: ProcessRecord, comparison: Comparison, knob: str) -> str | None:
    """Return why a comparison inside one process tells nothing about a knob, as a clause.

    The result is ``None`` if others have not disturbed the comparison too much.
    """
    complete = statistics.find_complete_blocks(process.whole_steps, comparison)
    history = _history(process)
    taken = mean_taken(complete, history)
    counted = len(find_counting_blocks(process, comparison))
    if counted < COUNTED_SHARE * len(complete):
        return f"{NOT_MEASURABLE}: {describe_others(taken)}"
    if knobs.get(knob).needs_quiet and not is_little(taken):
        return (
            f"it is only measurable on CPUs that others leave alone, and {describe_others(taken)}"
        )
    return None


def _history(process: ProcessRecord) -> History:
    return History(process.usage, process.usage_beside)


# Blocks of pairs


def find_blocks(baseline: ProcessRecord, variant: ProcessRecord, in_relay: bool) -> list[Block]:
    """Divide the steady steps of a pair (the timed steps after the warm-up) into blocks.

    Args:
        baseline, variant: the two runs of the pair.
        in_relay: whether the two runs alternated in blocks (a relay), so that one waited while the
            other ran.
    """
    both = (baseline, variant)
    steps = [process.steady_steps for process in both]
    whole_ms = [
        [step.step_ms for step in process.whole_steps[process.warmup_steps :] if step.mark is None]
        for process in both
    ]
    histories = [
        History(one.usage, [*one.usage_beside, *([one.beside(other)] if in_relay else [])])
        for one, other in (both, both[::-1])
    ]
    length = None if in_relay else _block_steps(steps)
    found = []
    for first, end in _find_positions(steps, length):
        seconds = [sum(side[first:end]) / 1e3 for side in whole_ms]
        stretches = [
            history.between(side[first].at_s, side[end - 1].end_s)
            for side, history in zip(steps, histories, strict=True)
        ]
        found.append(Block((first, end), seconds[0], seconds[1], stretches[0], stretches[1]))
    return found


def _block_steps(both: Sequence[Sequence[Step]]) -> int:
    """Return the number of steps of a block that takes about ``BLOCK_S`` or longer in both runs.

    The number is a power of two, so that it is the same for most pairs and their blocks can be
    compared.
    """
    usual_ms = [median(step.step_ms for step in side) for side in both if side]
    wanted = BLOCK_S * 1e3 / max(min(usual_ms, default=1.0), 1e-3)
    return int(2 ** math.ceil(math.log2(max(wanted, 1))))


def _find_positions(both: Sequence[Sequence[Step]], length: int | None) -> list[tuple[int, int]]:
    """Return, for each block, the index of its first step, and one more than that of its last step.

    A block ends where ``Step.block`` changes in either run, and after the last step that both runs
    have. If ``length`` is given, a block also ends after that number of steps.
    """
    found: list[tuple[int, int]] = []
    first, count = 0, min(map(len, both))
    for end in range(1, count + 1):
        is_over = end == count or any(side[end].block != side[end - 1].block for side in both)
        if is_over or end - first == length:
            found.append((first, end))
            first = end
    return found


def log_ratio(blocks: Sequence[Block]) -> float:
    """Return the logarithm of the ratio of a pair, computed from these blocks of the pair."""
    baseline_s = sum(block.baseline_s for block in blocks)
    return math.log(baseline_s / sum(block.variant_s for block in blocks))


def select(blocks: Sequence[Block], needs_quiet: bool) -> list[Block]:
    """Return the blocks of a pair that count; none if the pair does not count.

    If fewer than ``COUNTED_SHARE`` of the blocks count, but others took hardly anything of the CPUs
    (``HARDLY_TAKEN``), all blocks are returned.
    """
    counted = [block for block in blocks if block.counts(needs_quiet)]
    if len(counted) >= COUNTED_SHARE * len(blocks):
        return counted
    taken = _mean_taken(blocks)
    is_hardly_taken = taken is not None and taken <= HARDLY_TAKEN
    return list(blocks) if is_hardly_taken else []


# Pairs


def counted_pairs(pairs: Sequence[Sequence[Block]], needs_quiet: bool) -> list[list[Block]]:
    """Return, for each pair that counts, its blocks that count."""
    return [kept for blocks in pairs if (kept := select(blocks, needs_quiet))]


def assess(pairs: Sequence[Sequence[Block]], needs_quiet: bool) -> Quietness:
    """Assess how much others have disturbed some pairs.

    Args:
        pairs: the blocks of each pair.
        needs_quiet: whether others must be known to have left the CPUs alone.
    """
    counted = counted_pairs(pairs, needs_quiet)
    every = [block for blocks in pairs for block in blocks]
    kept = [block for blocks in counted for block in blocks]
    return Quietness(
        pairs=len(pairs),
        counted=len(counted),
        taken=_mean_taken(every),
        taken_from_counted=_mean_taken(kept),
        blocks_share=len(kept) / len(every) if every else 1.0,
        floors=estimate_floor_ratio(counted),
        contradiction=find_contradiction(counted),
    )


def is_enough(quietness: Quietness, log_ratios: Sequence[float], maximum: int) -> bool:
    """Return whether there are enough pairs for a claim, or as many as can be afforded.

    Args:
        quietness: how much others have disturbed the pairs.
        log_ratios: the logarithms of the ratios of the pairs that count.
        maximum: the number of pairs that can be afforded.
    """
    if quietness.pairs >= maximum:
        return True
    if quietness.why_not_measurable is not None:
        return False
    return statistics.has_enough_pairs(log_ratios, maximum)


def find_contradiction(pairs: Sequence[Sequence[Block]]) -> str | None:
    """Return how the floors of some pairs contradict a gain that the means show, as a clause.

    On each side, the floor lies below the mean by the noise of that side. The two sides differ in
    noise, so the ratio of the floors may well differ from the ratio of the means. The floors
    contradict a gain of the means if they show no gain at all; or if they show less than
    ``FLOOR_GAIN`` of it, and the interval of their ratio lies wholly below that of the means. The
    result is ``None`` if there is no contradiction, or if there are too few blocks or pairs to
    tell.

    Args:
        pairs: for each pair that counts, its blocks that count.
    """
    floors = estimate_floor_ratio(pairs)
    if floors is None or len(pairs) < FEWEST_COUNTED:
        return None
    means = statistics.estimate_ratio([log_ratio(blocks) for blocks in pairs])
    if not statistics.is_gain(means):
        return None
    is_less = floors.high < means.low
    is_less = is_less and math.log(floors.value) < FLOOR_GAIN * math.log(means.value)
    if is_less or floors.value <= 1:
        return f"the means give {means}, but the fastest times of the same blocks give {floors}"
    return None


def estimate_floor_ratio(pairs: Sequence[Sequence[Block]]) -> Ratio | None:
    """Estimate the ratio of the baseline's floors to the variant's; ``None`` if there are too few
    blocks.

    Blocks are weighted by their time, as in the means: a program may spend most of its time in a
    few blocks, such as those with rollouts or evaluation passes, and gain there.

    Args:
        pairs: for each pair that counts, its blocks that count.
    """
    places: dict[tuple[int, int], list[Block]] = {}
    for blocks in pairs:
        for block in blocks:
            places.setdefault(block.positions, []).append(block)
    if len(places) < FEWEST_FLOORS:
        return None
    floors = [
        (_floor([b.baseline_s for b in same]), _floor([b.variant_s for b in same]))
        for same in places.values()
    ]
    logs = [math.log(baseline_s / variant_s) for baseline_s, variant_s in floors]
    return statistics.estimate_weighted_ratio(logs, [sum(sides) for sides in floors])


def _floor(values: Sequence[float]) -> float:
    return sorted(values)[int(FLOOR_QUANTILE * (len(values) - 1))]


def _mean_taken(blocks: Sequence[Block]) -> float | None:
    known = [
        stretch.taken
        for block in blocks
        for stretch in (block.baseline, block.variant)
        if stretch.taken is not None
    ]
    return fmean(known) if known else None
