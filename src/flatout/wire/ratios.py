"""Estimating ratios of step times inside one process, with their confidence intervals.

Step times have a skewed distribution, drift, and are correlated with their neighbours: the
machine's speed changes by 2x within minutes. Each block of steps therefore counts once, by the
median of its step times. The model of the logarithms y of these medians, in the order of time, is

    y[i] = level - (sum of the logarithms of the ratios of the settings of block i) + e[i],
    e[i] = phi e[i-1] + noise,

a regression with autoregressive errors (Prais and Winsten 1954). A block is thus compared, above
all, with the blocks next to it, whichever arm they belong to. If the sizes of steps differ, as
those of batches of sentences do, the logarithms of the rows and elements of their inputs are
covariates (analysis of covariance), so that an arm that got the longer sentences has no
disadvantage. Residuals are bounded as in Huber (1981, Robust Statistics, sections 7.6 and 7.8), so
that a pause of the machine affects one block. The coefficient phi maximises the restricted
likelihood (Harville 1974).

This file imports only the standard library, because both halves load it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, median
from typing import TYPE_CHECKING, NamedTuple

from flatout.wire.codec import MismatchError

if TYPE_CHECKING:
    from flatout.wire.record import Step
    from flatout.wire.turns import Turn

CONFIDENCE = 0.95
"""The confidence level of all intervals."""

HUBER = 1.345
"""Residuals are bounded at this many standard deviations. The estimate is then 95 % efficient under
normal noise (Huber)."""

PHIS = (0.0, 0.3, 0.6, 0.8)
"""The values of phi of which the most likely one is chosen."""

CALIBRATION = 1.2
"""The intervals of the model are widened by this factor, because drift has slower components than
one autoregressive term can describe. On recorded step times, 95 % intervals without the factor
covered 90 % (``benchmarks/replay.py`` prints the share that they cover)."""

_LEAST_SIZE_VARIANCE = 1e-4
"""A covariate with a smaller variance than this is left out. It is the variance of the logarithms
of sizes that differ by 1 %."""

MINIMUM_DEGREES_OF_FREEDOM = 5
"""With fewer degrees of freedom, no ratio is estimated."""


LARGEST_LOG = 700.0
"""The logarithm of the largest limit of an interval: that of a few wildly different ratios may be
larger than any number."""


@dataclass(frozen=True)
class Ratio:
    """A speedup: the baseline's step time over the other's.

    Attributes:
        value: the estimate.
        low, high: the bounds of its confidence interval.
        pairs: the number of pairs of runs, or of blocks, that it is estimated from.
    """

    value: float
    low: float
    high: float
    pairs: int

    def check(self) -> None:
        """Raise ``MismatchError`` if no measurement can have given such a ratio."""
        if not (self.value > 0 and 0 < self.low <= self.high):
            raise MismatchError("must be positive, with an interval from low to high")

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f}, {self.pairs} pairs)"


def to_ratio(centre: float, half: float, pairs: int) -> Ratio:
    """Return the ratio whose logarithm has this value and half-width of its interval."""
    low, value, high = (
        math.exp(min(log, LARGEST_LOG)) for log in (centre - half, centre, centre + half)
    )
    return Ratio(value, low, high, pairs)


class Size(NamedTuple):
    """The size of a step.

    Attributes:
        rows, elements: the number of rows and of elements of the inputs of its outermost module
            calls.
    """

    rows: int
    elements: int

    @classmethod
    def of(cls, step: Turn | Step) -> Size | None:
        """Return the size of a step; ``None``: it was not recorded, or there were no inputs."""
        return cls(step.rows, step.elements) if step.rows and step.elements else None


@dataclass
class Block:
    """Consecutive steps of one arm.

    Attributes:
        arm: the number of the arm.
        times_ms: the step times, without the steps right after the switch to the arm.
        sizes: the sizes of these steps, in order.
        first_ms: the step times of the first block of an arm, which warms up and is not used for
            ratios.
        start_s, end_s: the beginning of the first timed step and the end of the last, in seconds
            since the header of the record; ``None``: there are no steps, or it is not known.
    """

    arm: int
    times_ms: list[float] = field(default_factory=list)
    sizes: list[Size | None] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    start_s: float | None = None
    end_s: float | None = None

    def add(self, step_ms: float, size: Size | None, at_s: float | None = None) -> None:
        """Add a step to this block; ``at_s`` is its beginning, see ``start_s``."""
        self.times_ms.append(step_ms)
        self.sizes.append(size)
        if at_s is not None:
            self.start_s = at_s if self.start_s is None else self.start_s
            self.end_s = at_s + step_ms / 1e3


def merge_steps(blocks: Sequence[Block]) -> list[Block]:
    """Return blocks of one time each, the mean step time of the block.

    Blocks that are whole cycles of a program have a few steps that are far longer than the others,
    which the median would leave out.
    """
    return [
        dataclasses.replace(block, times_ms=[fmean(block.times_ms)], sizes=[None])
        if block.times_ms
        else block
        for block in blocks
    ]


def estimate_arm_ratios(blocks: Sequence[Block], baseline: int = 0) -> dict[int, Ratio]:
    """Estimate the ratio of each arm to the baseline.

    Args:
        blocks: the blocks in the order of time; blocks without times are ignored.
        baseline: the arm that the others are compared with.

    Returns:
        A map from each other arm to its ratio; it is empty while there are too few blocks.
    """
    timed = [block for block in blocks if block.times_ms]
    others = sorted({block.arm for block in timed} - {baseline})
    if len(others) == len({block.arm for block in timed}):
        return {}
    column = {arm: number for number, arm in enumerate(others, 1)}
    rows = [[] if block.arm == baseline else [column[block.arm]] for block in timed]
    ratios = _estimate_ratios(timed, rows, 1 + len(others))
    return dict(zip(others, ratios, strict=False))


def estimate_setting_ratios(
    blocks: Sequence[Block], arms: Sequence[Mapping[str, str]]
) -> dict[tuple[str, str], Ratio]:
    """Estimate each setting's main effect as a speedup factor, when the arms are combinations of
    settings (``tune.design``).

    Args:
        blocks: the blocks in the order of time; blocks without times are ignored.
        arms: the ``knob -> setting`` map of each arm.

    Returns:
        A map from each pair of knob and setting to its ratio; it is empty while there are too few
        blocks.
    """
    timed = [block for block in blocks if block.times_ms]
    settings = sorted({item for block in timed for item in arms[block.arm].items()})
    column = {item: number for number, item in enumerate(settings, 1)}
    rows = [[column[item] for item in arms[block.arm].items()] for block in timed]
    ratios = _estimate_ratios(timed, rows, 1 + len(settings))
    return dict(zip(settings, ratios, strict=False))


def is_decided(ratio: Ratio, worthwhile: float) -> bool:
    """Whether the interval shows that there is a gain, or that there is no gain worth having.

    Args:
        ratio: the speedup.
        worthwhile: the least speedup that is worth having.
    """
    return ratio.low > 1 or ratio.high < worthwhile


# The regression


class _Fit(NamedTuple):
    coefficients: list[float]
    inverse: list[list[float]]
    variance: float
    log_likelihood: float


def _estimate_ratios(
    timed: Sequence[Block], on: Sequence[Sequence[int]], width: int
) -> list[Ratio]:
    """Estimate one ratio for each column except the first, which is the level.

    Args:
        timed: the blocks, each with at least one step time.
        on: for each block, the columns whose value is 1 in its row.
        width: the number of columns.

    Returns:
        The ratios in the order of the columns; none if there are too few blocks.
    """
    covariates = _make_covariates(timed)
    if covariates:
        logs = [fmean(map(math.log, block.times_ms)) for block in timed]
    else:
        logs = [math.log(median(block.times_ms)) for block in timed]
    rows = [
        {0: 1.0, **dict.fromkeys(columns, 1.0), **dict(enumerate(values, width))}
        for columns, *values in zip(on, *covariates, strict=True)
    ]
    wide = width + len(covariates)
    freedom = len(rows) - wide - 1
    if freedom < MINIMUM_DEGREES_OF_FREEDOM or width < 2:
        return []
    fits = [_fit(rows, logs, wide, phi) for phi in PHIS]
    known = [fit for fit in fits if fit is not None]
    if not known:
        return []
    best = max(known, key=lambda fit: fit.log_likelihood)
    quantile = t_quantile((1 + CONFIDENCE) / 2, freedom)
    ratios = []
    for column in range(1, width):
        centre = -best.coefficients[column]
        half = CALIBRATION * quantile * math.sqrt(best.variance * best.inverse[column][column])
        turned_on = sum(column in columns for columns in on)
        pairs = min(turned_on, len(rows) - turned_on)
        ratios.append(to_ratio(centre, half, pairs))
    return ratios


def _make_covariates(timed: Sequence[Block]) -> list[list[float]]:
    """Return the covariates for the sizes of the steps, each with a value for each block.

    A covariate is the mean over a block of the logarithm of the elements, of its square, or of the
    logarithm of the rows, made orthogonal to the covariates before it (Gram and Schmidt). There are
    no covariates if the sizes do not differ.
    """
    sizes = [block.sizes for block in timed]
    known = {size for block in sizes for size in block}
    if None in known or len(known) < 2:
        return []
    terms: list[Callable[[Size], float]] = [
        lambda size: math.log(size.elements),
        lambda size: (math.log(size.elements) - middle) ** 2,
        lambda size: math.log(size.rows),
    ]
    steps = [size for block in sizes for size in block if size is not None]
    middle = fmean(map(terms[0], steps))
    covariates: list[list[float]] = []
    for term in terms:
        values = [fmean(term(size) for size in block if size is not None) for block in sizes]
        centre = fmean(values)
        values = [value - centre for value in values]
        for other in covariates:
            share = _product(values, other) / _product(other, other)
            values = [value - share * taken for value, taken in zip(values, other, strict=True)]
        if _product(values, values) > _LEAST_SIZE_VARIANCE * len(values):
            covariates.append(values)
    return covariates


def _product(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _fit(
    rows: Sequence[Mapping[int, float]], logs: Sequence[float], width: int, phi: float
) -> _Fit | None:
    """Return Huber's estimate for one phi; ``None`` if the columns are linearly dependent.

    Args:
        rows: for each block, the columns that are not 0, and their values.
        logs: the logarithm of the step time of each block.
        width: the number of columns.
        phi: the correlation of an error with the error of the block before.
    """
    first = math.sqrt(1 - phi**2)
    whitened, values = _whiten(rows, logs, phi)
    normal = [[0.0] * width for _ in range(width)]
    for row in whitened:
        for column, value in row:
            line = normal[column]
            for other, factor in row:
                line[other] += value * factor
    inverted = _invert(normal)
    if inverted is None:
        return None
    inverse, log_determinant = inverted
    count = len(rows)
    coefficients = [0.0] * width
    scale = math.inf
    residuals = values
    for _ in range(6):
        gradient = [0.0] * width
        for row, residual in zip(whitened, residuals, strict=True):
            bounded = min(max(residual, -HUBER * scale), HUBER * scale)
            for column, value in row:
                gradient[column] += value * bounded
        coefficients = [
            coefficient + sum(a * b for a, b in zip(line, gradient, strict=True))
            for coefficient, line in zip(coefficients, inverse, strict=True)
        ]
        residuals = [
            value - sum(coefficients[column] * factor for column, factor in row)
            for row, value in zip(whitened, values, strict=True)
        ]
        # The fit makes about as many residuals zero as it has columns.
        scale = sorted(map(abs, residuals))[(count + width) // 2] / _NORMAL_MEDIAN
        scale = max(scale, 1e-9)
    inside = sum(abs(residual) <= HUBER * scale for residual in residuals) / count
    power = sum(min(abs(residual), HUBER * scale) ** 2 for residual in residuals)
    correction = 1 + width / count * (1 - inside) / inside
    freedom = count - width
    variance = correction**2 * max(power, 1e-18) / freedom / inside**2
    log_likelihood = -freedom / 2 * math.log(variance) + math.log(first) - log_determinant / 2
    return _Fit(coefficients, inverse, variance, log_likelihood)


def _whiten(
    rows: Sequence[Mapping[int, float]], logs: Sequence[float], phi: float
) -> tuple[list[list[tuple[int, float]]], list[float]]:
    """Transform rows and logarithms so that their errors are independent (Prais and Winsten); for
    the arguments see ``_fit``."""
    first = math.sqrt(1 - phi**2)
    whitened = [[(column, first * value) for column, value in rows[0].items()]]
    values = [first * logs[0]]
    for number in range(1, len(rows)):
        now, before = rows[number], rows[number - 1]
        whitened.append(
            [
                (column, now.get(column, 0.0) - phi * before.get(column, 0.0))
                for column in {**now, **before}
            ]
        )
        values.append(logs[number] - phi * logs[number - 1])
    return whitened, values


_NORMAL_MEDIAN = NormalDist().inv_cdf(0.75)
"""The median of the absolute value of a standard normal variable."""


def _invert(matrix: Sequence[Sequence[float]]) -> tuple[list[list[float]], float] | None:
    """Return the inverse and the log determinant of a positive definite matrix; ``None`` if the
    matrix is singular."""
    size = len(matrix)
    lines = [
        [*line, *(float(number == other) for other in range(size))]
        for number, line in enumerate(matrix)
    ]
    largest = max(line[number] for number, line in enumerate(matrix))
    log_determinant = 0.0
    for number in range(size):
        pivot = lines[number][number]
        if pivot < 1e-9 * largest:
            return None
        log_determinant += math.log(pivot)
        line = lines[number] = [value / pivot for value in lines[number]]
        for other in range(size):
            factor = lines[other][number]
            if other != number and factor:
                lines[other] = [
                    value - factor * taken for value, taken in zip(lines[other], line, strict=True)
                ]
    return [line[size:] for line in lines], log_determinant


def t_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution, accurate to 1 % from 5 degrees of freedom on.

    The approximation is formula 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical
    Functions.

    Args:
        probability: the probability of a smaller value.
        freedom: the degrees of freedom.
    """
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / 4 / freedom
        + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / freedom**2
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / freedom**3
    )
