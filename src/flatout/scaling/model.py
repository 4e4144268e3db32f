"""The time of a step as a function of the number of ranks.

A step of ``n`` ranks takes the sum of

- what every rank does alike, and what it does because there are others;
- its shard: a fixed time, and a time for each row of the largest shard;
- what the slowest rank takes longer than the mean (``maximum.py``). The ranks wait for each other
  after each pass of a shard. If a step has ``m`` such parts that vary independently, each has the
  deviation of the step over ``sqrt(m)``, so that the waits add up to ``sqrt(m)`` times the expected
  maximum of a step;
- its exchanges (``networks.py``).

All figures are drawn again and again: steps of a run are drawn with replacement (Efron 1979), and
what differs from run to run, and the network, by their standard errors. The percentiles of what
follows from the draws are the intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flatout.errors import UserError
from flatout.parallel import header
from flatout.scaling.maximum import expected_maximum
from flatout.scaling.measured import Exchanges, MeasuredRun
from flatout.scaling.networks import Algorithm, Network, Software, gather_s, sum_s

Array = npt.NDArray[np.float64]

MOST_RANKS = 4096
COVERAGE = 0.9
DRAWS = 400

RUN_ERROR = 0.05
"""Relative standard deviation of the step time between runs of the same program: pairs of runs with
a start-up between them scatter by 7 % (ARCHITECTURE.md), a run by that over ``sqrt(2)``."""

LEAST_EFFICIENCY = 0.8

LEAST_RATIO = 1.25
"""Of the sizes of two shards, if the fixed time is to follow from them."""

CALLS_TOLERANCE = 0.02
"""Share of the calls of a program that may not be shared out, if their time is to be compared with
that of all calls."""

MOST_DEVIATIONS = 512
"""Deviations that are drawn at once: more tell little more, and take memory for each number of
ranks."""


@dataclass(frozen=True)
class Interval:
    """A prediction.

    Attributes:
        value: the median of the draws.
        low, high: its interval, which has the probability ``COVERAGE``.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Prediction:
    """A step with a number of ranks.

    Attributes:
        ranks: their number.
        step_s: the time of the step.
        speedup: over one rank alone, with the same threads.
        efficiency: the speedup over the number of ranks.
        shares: of the step, by ``PARTS``.
        is_whole: whether the batch has fewer rows than there are ranks, so that each computes it
            whole.
    """

    ranks: int
    step_s: Interval
    speedup: Interval
    efficiency: Interval
    shares: dict[str, float]
    is_whole: bool


@dataclass(frozen=True)
class Forecast:
    """What is predicted from some runs.

    Attributes:
        program: its name.
        network: between the ranks.
        algorithm: of the exchanges.
        batch: rows of a shared call, on average.
        threads: of each rank.
        alone_s: the time of a step of one rank alone.
        predictions: by the number of ranks.
        inefficient_from: the smallest of ``ranks_looked_at`` whose efficiency is below
            ``LEAST_EFFICIENCY``; ``MOST_RANKS`` + 1: there is none.
        measured_s: the mean time of a step in the runs, by the number of ranks.
        knows_fixed_time: whether shards of two sizes were measured.
        knows_software: whether the time of an exchange beside the network was measured.
    """

    program: str
    network: Network
    algorithm: Algorithm
    batch: float
    threads: int | None
    alone_s: Interval
    predictions: tuple[Prediction, ...]
    inefficient_from: Interval
    measured_s: dict[int, float]
    knows_fixed_time: bool
    knows_software: bool


@dataclass(frozen=True)
class Work:
    """The work of a step, in one draw.

    Attributes:
        fixed_s, row_s: of a shard, and of each of its rows.
        alike_s, comparison_s: of each rank.
        deviations: see ``MeasuredRun``.
        exchanges: with ``ranks`` ranks.
        ranks: the number with which the exchanges were counted.
    """

    fixed_s: float
    row_s: float
    alike_s: float
    comparison_s: float
    deviations: Array
    exchanges: Exchanges
    ranks: int

    @property
    def batch(self) -> float:
        """Rows of a shared call."""
        return self.exchanges.rows / self.exchanges.calls

    @property
    def alone_s(self) -> float:
        """A step of one rank alone."""
        return self.alike_s + self.fixed_s + self.row_s * self.exchanges.rows


PARTS = ("shard", "alike", "comparison", "waiting", "exchange")
"""Of a step."""


def forecast(
    runs: Sequence[MeasuredRun],
    network: Network,
    software: Software | None,
    ranks: Sequence[int],
    algorithm: Algorithm = "ring",
    seed: int = 0,
) -> Forecast:
    """Predict the step of the first run that has several ranks.

    Args:
        runs: at least one with several ranks. If their shards have different sizes, the others tell
            the fixed time of a shard.
        network: between the ranks.
        software: what an exchange takes on any network; ``None``: not measured, so the prediction
            has only what the network takes.
        ranks: the numbers of ranks to predict.
        algorithm: of the exchanges.
        seed: of the draws.

    Raises:
        UserError: the runs do not fit together.
    """
    base = choose_base(runs)
    sizes = shard_sizes(runs, base)
    generator = np.random.default_rng(seed)
    every = ranks_looked_at(ranks)
    wanted = np.searchsorted(every, ranks)
    steps, alone, shares, thresholds = [], [], [], []
    for _ in range(DRAWS):
        work = draw_work(runs, base, sizes, generator)
        drawn, of_software = draw_network(network, software, generator)
        parts = compute_parts(work, drawn, of_software, every, base.threads or 1, algorithm)
        step_s = parts.sum(axis=0)
        thresholds.append(find_inefficient(work.alone_s / (every * step_s), every))
        steps.append(step_s[wanted] * math.exp(RUN_ERROR * generator.standard_normal()))
        alone.append(work.alone_s)
        shares.append(parts[:, wanted] / step_s[wanted])
    return Forecast(
        base.header.program,
        network,
        algorithm,
        _batch(base),
        base.threads,
        _interval(np.array(alone)),
        _predictions(ranks, np.array(steps), np.array(alone), np.array(shares), _batch(base)),
        _interval(np.array(thresholds)),
        {r.ranks: float(r.step_s.mean()) for r in runs if r.inputs == base.inputs},
        have_two_sizes(sizes),
        software is not None,
    )


def ranks_looked_at(ranks: Sequence[int]) -> Array:
    """Return the numbers of ranks for which everything is computed, in order: those that are to be
    predicted, all up to 128, and those beyond that differ by 1 %."""
    steps = round(math.log(MOST_RANKS / 128) / math.log(1.01))
    beyond = np.round(np.geomspace(128, MOST_RANKS, steps))
    found: Array = np.unique(np.concatenate([np.arange(2.0, 129), beyond, ranks]))
    return found


def choose_base(runs: Sequence[MeasuredRun]) -> MeasuredRun:
    """Return the run whose step is predicted.

    Raises:
        UserError: none has ranks.
    """
    for run in runs:
        if run.exchanges is not None:
            return run
    raise UserError(
        "none of these runs has several ranks, so what they exchange is not known: "
        "flatout run --ranks 2 -- COMMAND makes such a record"
    )


def shard_sizes(runs: Sequence[MeasuredRun], base: MeasuredRun) -> list[float]:
    """Return the rows of a rank's shards in a step, for each run.

    Raises:
        UserError: the runs are those of different programs, or have different numbers of threads,
            so that the times of their shards cannot be compared; or the batch of one is not known.
    """
    assert base.exchanges is not None
    found = []
    for run in runs:
        if run.header.program != base.header.program:
            raise UserError(
                f"{run.directory} is a run of {run.header.program}, and {base.directory} one of "
                f"{base.header.program}"
            )
        if run.threads != base.threads:
            raise UserError(
                f"a rank computes with {base.threads} threads in {base.directory} and with "
                f"{run.threads} in {run.directory}, so their times cannot be compared: set "
                "OMP_NUM_THREADS, which the ranks of a run share out, in proportion to --ranks"
            )
        if run.exchanges is not None:
            found.append(run.exchanges.rows / run.ranks)
            continue
        if run.inputs != base.inputs:
            raise UserError(
                f"the inputs of {run.directory} differ from those of {base.directory}, and how "
                "many samples a batch has is recorded only with --ranks"
            )
        if abs(run.forwards - base.exchanges.calls) > CALLS_TOLERANCE * run.forwards:
            raise UserError(
                f"{run.forwards:.3g} calls a step are made in {run.directory}, and "
                f"{base.exchanges.calls:.3g} are shared out in {base.directory}, so their times "
                "cannot be compared: give another run with several ranks in its place"
            )
        found.append(base.exchanges.rows)
    return found


def draw_work(
    runs: Sequence[MeasuredRun],
    base: MeasuredRun,
    rows: Sequence[float],
    generator: np.random.Generator,
) -> Work:
    """Draw the work of a step of the base.

    Args:
        runs, base: what was measured.
        rows: of a shard, in each run.
        generator: of the draws.
    """
    assert base.exchanges is not None
    points = []
    alike_s = comparison_s = 0.0
    for run, of_run in zip(runs, rows, strict=True):
        drawn = generator.integers(len(run.step_s), size=len(run.step_s))
        error = math.exp(RUN_ERROR * generator.standard_normal())
        points.append((of_run, float(run.shard_s[drawn].mean()) * error))
        if run is base:
            alike_s = float(run.alike_s[drawn].mean()) * error
            comparison_s = float(run.comparison_s[drawn].mean()) * error
    fixed_s, row_s = fit_shard(points, generator.uniform())
    number = min(len(base.deviations), MOST_DEVIATIONS)
    deviations = generator.choice(base.deviations, number)
    return Work(fixed_s, row_s, alike_s, comparison_s, deviations, base.exchanges, base.ranks)


def draw_network(
    network: Network, software: Software | None, generator: np.random.Generator
) -> tuple[Network, Software]:
    """Draw the figures of a network, and of the software."""
    latency, rate = np.exp(network.error * generator.standard_normal(2))
    if software is None:
        return network.scaled(latency, rate), Software(0.0, 0.0, 0.0)
    factor = math.exp(software.error * generator.standard_normal())
    scaled = Software(software.call_s * factor, software.header_s * factor, software.error)
    return network.scaled(latency, rate), scaled


def fit_shard(points: Sequence[tuple[float, float]], fixed_share: float) -> tuple[float, float]:
    """Return the fixed time of a shard, and the time of each row; neither is negative.

    Args:
        points: rows and time of shards.
        fixed_share: the share of the fixed time where all shards have one size, since it is not
            known then.
    """
    rows, times_s = np.array(points).T
    if not have_two_sizes(rows):
        mean_s = float(times_s.mean())
        return fixed_share * mean_s, (1 - fixed_share) * mean_s / float(rows.mean())
    row_s, fixed_s = np.polyfit(rows, times_s, 1)
    if fixed_s < 0:
        return 0.0, float(rows @ times_s / (rows @ rows))
    if row_s < 0:
        return float(times_s.mean()), 0.0
    return float(fixed_s), float(row_s)


def have_two_sizes(rows: Sequence[float] | Array) -> bool:
    """Whether the fixed time of a shard follows from shards of these sizes."""
    return bool(max(rows) >= LEAST_RATIO * min(rows))


def compute_parts(
    work: Work,
    network: Network,
    software: Software,
    ranks: Array,
    threads: int,
    algorithm: Algorithm,
) -> Array:
    """Return the parts of a step: one row for each of ``PARTS``, one column for each number of
    ranks, in seconds.

    Args:
        work: of the step.
        network, software: of the exchanges.
        ranks: their numbers.
        threads: of each rank.
        algorithm: of the exchanges.
    """
    is_whole = ranks > work.batch
    rows = work.exchanges.rows * np.where(is_whole, 1.0, largest_share(work.batch, ranks))
    shard_s = work.fixed_s + work.row_s * rows
    own_s = shard_s + work.alike_s + work.comparison_s
    passes = work.exchanges.calls + work.exchanges.backwards
    waiting_s = own_s * np.sqrt(passes) * expected_maximum(work.deviations, ranks)
    crowd = np.ones(len(ranks))
    if network.processors is not None:
        crowd = np.maximum(1.0, ranks * threads / network.processors)
    exchange_s = compute_exchange_s(work, network, software, ranks, algorithm)
    alike_s, comparison_s = (np.full(len(ranks), s) for s in (work.alike_s, work.comparison_s))
    waiting_s = np.maximum(waiting_s, 0.0)
    if network.is_copied:
        exchange_s = exchange_s * crowd
    of_processors = crowd * np.stack([shard_s, alike_s, comparison_s, waiting_s])
    parts: Array = np.vstack([of_processors, exchange_s])
    return parts


def largest_share(batch: float, ranks: Array) -> Array:
    """Return which part of a batch the largest shard has."""
    rows = np.maximum(1.0, np.round(batch))
    share: Array = np.ceil(rows / ranks) / rows
    return share


def compute_exchange_s(
    work: Work, network: Network, software: Software, ranks: Array, algorithm: Algorithm
) -> Array:
    """Return the time of the exchanges of a step.

    Gathered shards are as long as the largest one. A batch that is computed whole takes only the
    meeting before its call.
    """
    done = work.exchanges
    headers_s = software.header_s * ranks
    meeting_s = software.call_s + headers_s
    said_bytes = np.array([header.BYTES + header.attached_bytes(int(n), False) for n in ranks])
    meeting_s = meeting_s + gather_s(network, ranks, said_bytes * ranks, algorithm)
    padded = ranks * largest_share(work.batch, ranks)
    padded_before = work.ranks * largest_share(work.batch, np.array([float(work.ranks)]))
    gathered_s = summed_s = np.zeros(len(ranks))
    if done.gathers:
        each = done.gathered_bytes / done.gathers * padded / padded_before
        gathered_s = done.gathers * (software.call_s + gather_s(network, ranks, each, algorithm))
    if done.sums:
        each = np.full(len(ranks), done.summed_bytes / done.sums)
        summed_s = done.sums * (software.call_s + sum_s(network, ranks, each, algorithm))
    shared_s = done.meetings * meeting_s + gathered_s + summed_s
    found: Array = np.where(ranks > work.batch, done.calls * meeting_s, shared_s)
    return found


def find_inefficient(efficiency: Array, ranks: Array) -> float:
    """Return the smallest number of ranks whose efficiency is too low; one more than the largest if
    there is none."""
    below = efficiency < LEAST_EFFICIENCY
    return float(ranks[np.argmax(below)] if below.any() else ranks[-1] + 1)


def _batch(run: MeasuredRun) -> float:
    assert run.exchanges is not None
    return run.exchanges.rows / run.exchanges.calls


def _predictions(
    ranks: Sequence[int], steps: Array, alone: Array, shares: Array, batch: float
) -> tuple[Prediction, ...]:
    """Return the predictions.

    Args:
        ranks: their numbers.
        steps: times for each draw (first dimension) and number of ranks.
        alone: times for each draw.
        shares: for each draw, part and number of ranks.
        batch: rows of a shared call.
    """
    found = []
    medians = np.median(shares, axis=0)
    for i, number in enumerate(ranks):
        speedups = alone / steps[:, i]
        found.append(
            Prediction(
                number,
                _interval(steps[:, i]),
                _interval(speedups),
                _interval(speedups / number),
                dict(zip(PARTS, map(float, medians[:, i]), strict=True)),
                number > batch,
            )
        )
    return tuple(found)


def _interval(draws: Array) -> Interval:
    margin = (1 - COVERAGE) / 2
    low, value, high = np.quantile(draws, [margin, 0.5, 1 - margin])
    return Interval(float(value), float(low), float(high))
