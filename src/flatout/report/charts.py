"""Draws the charts of the page as inline SVG, with percentages, so that they grow with the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from flatout.report.markup import Markup, element, join
from flatout.tune import formatting
from flatout.tune.document import PARTS, CurvePoint, Curves
from flatout.wire.ratios import Ratio

POINTS_SHOWN = 300
"""Most points of a loss curve; if there are more steps, several share a point."""

LOG_SPAN = 30
"""Ratio of the largest loss to the smallest above which the axis is logarithmic."""

_FARTHEST = 2.0
"""The axis ends at this multiple of the extreme ratios; a longer interval ends in an arrow."""

_RATIO_TICKS = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0),
    *(10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0),
)
_TICK_DISTANCE = 13.0
"""Smallest distance between two ticks, in percent of the axis, so that their numbers fit."""


@dataclass(frozen=True)
class RatioAxis:
    """A logarithmic axis of ratios."""

    low: float
    high: float

    @classmethod
    def over(cls, ratios: Iterable[Ratio]) -> RatioAxis:
        """Make an axis that shows these ratios, and 1."""
        finite = [r for r in ratios if math.isfinite(r.value)]
        least = min((r.value for r in finite), default=1.0)
        most = max((r.value for r in finite), default=1.0)
        low = min([0.93, *(max(r.low, least / _FARTHEST) for r in finite)])
        high = max([1.07, *(min(r.high, most * _FARTHEST) for r in finite)])
        return cls(low / (high / low) ** 0.04, high * (high / low) ** 0.04)

    def percent(self, ratio: float) -> float:
        """The position of a ratio in percent of the width; one beyond an end is at that end."""
        if not math.isfinite(ratio):
            return 100.0
        place = math.log(ratio / self.low) / math.log(self.high / self.low)
        return 100 * min(max(place, 0.0), 1.0)

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is on the axis."""
        return self.low <= ratio <= self.high

    @property
    def ticks(self) -> list[float]:
        """The ratios that are marked: 1, and others as far as their numbers fit."""
        chosen = [1.0]
        for tick in sorted(_RATIO_TICKS, key=lambda t: abs(math.log(t))):
            places = [self.percent(other) for other in chosen]
            if self.holds(tick) and all(
                abs(self.percent(tick) - place) >= _TICK_DISTANCE for place in places
            ):
                chosen.append(tick)
        return sorted(chosen)

    def numbers(self) -> Markup:
        """Draw the axis."""
        texts = [
            element(
                "text",
                f"{tick:g}\N{MULTIPLICATION SIGN}",
                x=f"{self.percent(tick):.2f}%",
                y="13",
                text_anchor="middle",
                class_="one" if tick == 1 else None,
            )
            for tick in self.ticks
        ]
        return element("svg", *texts, class_="ratio", height="18", aria_hidden="true")

    def interval(self, ratio: Ratio, class_: str) -> Markup:
        """Draw a ratio as a point with its interval."""
        middle, (left, right) = "11", (self.percent(ratio.low), self.percent(ratio.high))
        drawn = [
            element("line", x1=f"{left:.2f}%", x2=f"{right:.2f}%", y1=middle, y2=middle),
            *(
                _arrow(self.percent(end), points_right)
                for end, points_right in ((ratio.low, False), (ratio.high, True))
                if not self.holds(end)
            ),
            element("circle", cx=f"{self.percent(ratio.value):.2f}%", cy=middle, r="4.5"),
        ]
        return element("svg", *drawn, class_=f"ratio {class_}", height="22", aria_hidden="true")

    @property
    def grid(self) -> str:
        """The CSS of the lines at the ticks, behind all rows."""
        lines = []
        for tick in self.ticks:
            at = f"{self.percent(tick):.2f}%"
            colour = "var(--axis)" if tick == 1 else "var(--rule)"
            lines.append(
                f"linear-gradient(to right, transparent calc({at} - .5px), {colour} "
                f"calc({at} - .5px), {colour} calc({at} + .5px), transparent calc({at} + .5px))"
            )
        return f"--grid: {', '.join(lines)}"


def phases(bars: Sequence[tuple[str, Mapping[str, float | None]]]) -> Markup:
    """Draw phases as stacked horizontal bars on one scale.

    Args:
        bars: the name of each bar, and the time of each of its phases in milliseconds.
    """
    longest_ms = max(sum(_select_measured(times).values()) for _, times in bars)
    drawn = []
    for name, times in bars:
        measured = _select_measured(times)
        total_ms = sum(measured.values())
        segments, left = [], 0.0
        for phase, ms in measured.items():
            width = 100 * ms / longest_ms
            segments.append(
                element(
                    "rect",
                    x=f"{left:.3f}%",
                    width=f"{width:.3f}%",
                    y="0",
                    height="30",
                    class_=f"phase-{phase}",
                )
            )
            left += width
        told = ", ".join(f"{p} {formatting.milliseconds(ms)}" for p, ms in measured.items())
        drawn.append(
            element(
                "div",
                element(
                    "p",
                    element("span", name),
                    element("strong", formatting.milliseconds(total_ms)),
                    class_="bar-label",
                ),
                element(
                    "svg",
                    element("title", f"{name}: {told}"),
                    *segments,
                    role="img",
                    height="30",
                    class_="phases",
                ),
            )
        )
    return join(*drawn)


def _select_measured(times_ms: Mapping[str, float | None]) -> dict[str, float]:
    """The parts that were measured, in the order of a step."""
    return {phase: max(ms, 0.0) for phase in PARTS if (ms := times_ms.get(phase)) is not None}


PLOT_HEIGHT = 220


def curves(shown: Curves) -> Markup | None:
    """Draw losses by step, bare and with the plan, with bands; ``None``: there are none."""
    sides = {"bare": thin(shown.bare), "plan": thin(shown.plan)}
    points = [point for side in sides.values() for point in side]
    levels = [v for p in points for v in p[1:] if v is not None and math.isfinite(v)]
    if not levels:
        return None
    first, last = min(p.step for p in points), max(p.step for p in points)
    axis = _LossAxis.over(levels)

    def place(step: int, level: float) -> str:
        across = 100 * (step - first) / max(last - first, 1)
        return f"{across:.2f} {100 - axis.percent(level):.2f}"

    bands, means = [], []
    for name, side in sides.items():
        for part in _split_at_gaps(side):
            bands.append(_band(part, place, f"band {name}"))
            path = "M" + "L".join(place(p.step, p.mean) for p in part if p.mean is not None)
            means.append(element("path", d=path, class_=f"curve {name}"))
    lines = [
        element("line", x1="0", x2="100%", y1=f"{100 - at:.2f}%", y2=f"{100 - at:.2f}%")
        for at in map(axis.percent, axis.ticks)
    ]
    numbers = [
        element(
            "text",
            f"{tick:.6g}",
            x="-8",
            y=f"{100 - axis.percent(tick):.2f}%",
            dy="4",
            text_anchor="end",
        )
        for tick in axis.ticks
    ]
    steps = [
        element("text", f"{first:,}", x="0", y="100%", dy="20"),
        element("text", f"step {last:,}", x="100%", y="100%", dy="20", text_anchor="end"),
    ]
    plot = element(
        "svg",
        *bands,
        *means,  # above both bands, so that no line is hidden
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
    )
    return element(
        "svg",
        element("title", _describe(shown)),
        *lines,
        *numbers,
        *steps,
        plot,
        role="img",
        height=str(PLOT_HEIGHT),
        class_="curves",
    )


def is_logarithmic(shown: Curves) -> bool:
    """Whether the losses are drawn on a logarithmic axis."""
    levels = [v for p in (*shown.bare, *shown.plan) for v in p[1:] if v is not None]
    finite = [v for v in levels if math.isfinite(v)]
    return bool(finite) and _LossAxis.over(finite).logarithmic


def thin(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Reduce a curve to ``POINTS_SHOWN`` points: means over equal windows, whose bands contain all
    points of the window."""
    window = max(1, math.ceil(len(points) / POINTS_SHOWN))
    if window == 1:
        return list(points)
    shown = []
    for start in range(0, len(points), window):
        part = points[start : start + window]
        rows = [p for p in part if p.mean is not None and math.isfinite(p.mean)]
        if not rows:
            shown.append(part[0])
            continue
        edges = [v for p in rows for v in p[1:] if v is not None and math.isfinite(v)]
        mean = fmean(p.mean for p in rows if p.mean is not None)
        shown.append(CurvePoint(part[len(part) // 2].step, mean, min(edges), max(edges)))
    return shown


@dataclass(frozen=True)
class _LossAxis:
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, levels: Sequence[float]) -> _LossAxis:
        low, high = min(levels), max(levels)
        if low > 0 and high > LOG_SPAN * low:
            return cls(low, high, True)
        margin = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - margin, high + margin, False)

    def percent(self, level: float) -> float:
        if self.logarithmic:
            return 100 * math.log(level / self.low) / math.log(self.high / self.low)
        return 100 * (level - self.low) / (self.high - self.low)

    @property
    def ticks(self) -> list[float]:
        if self.logarithmic:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            ticks = [m * 10.0**decade for decade in decades for m in (1, 2, 5)]
            if len(decades) > 4:
                ticks = [10.0**decade for decade in decades[:: math.ceil(len(decades) / 6)]]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            distance = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
            start = math.ceil(self.low / distance)
            ticks = [n * distance for n in range(start, math.floor(self.high / distance) + 1)]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _split_at_gaps(points: Sequence[CurvePoint]) -> list[list[CurvePoint]]:
    """Split a curve at points that have no finite mean."""
    parts = groupby(points, key=lambda p: p.mean is not None and math.isfinite(p.mean))
    return [list(part) for is_drawn, part in parts if is_drawn]


def _band(
    points: Sequence[CurvePoint], place: Callable[[int, float], str], class_: str
) -> Markup | None:
    edges = [
        (p.step, p.low, p.high)
        for p in points
        if p.low is not None
        and p.high is not None
        and math.isfinite(p.low)
        and math.isfinite(p.high)
    ]
    if not any(high > low for _, low, high in edges):
        return None
    there = [place(step, high) for step, _, high in edges]
    back = [place(step, low) for step, low, _ in reversed(edges)]
    return element("path", d="M" + "L".join(there + back) + "Z", class_=class_)


def _describe(shown: Curves) -> str:
    """Describe the curves in a sentence."""
    told = []
    for name, side in (("bare", shown.bare), ("with the plan", shown.plan)):
        for part in _split_at_gaps(side):
            first, last = part[0], part[-1]
            told.append(
                f"{name} from {first.mean:.4g} at step {first.step} to {last.mean:.4g} at step "
                f"{last.step}"
            )
    return f"{shown.site}: {'; '.join(told)}"


def _arrow(percent: float, points_right: bool) -> Markup:
    """Draw the end of an interval that continues beyond the axis."""
    away = -6 if points_right else 6
    return element(
        "svg",
        element("path", d=f"M{away} 6L0 11L{away} 16"),
        x=f"{percent:.2f}%",
        class_="arrow",
    )
