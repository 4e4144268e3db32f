"""Prints how a program is predicted to scale."""

from __future__ import annotations

from typing import IO

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flatout.scaling.model import (
    COVERAGE,
    LEAST_EFFICIENCY,
    MOST_RANKS,
    PARTS,
    Forecast,
    Interval,
    Prediction,
)
from flatout.scaling.networks import HERE, Network
from flatout.tune.formatting import milliseconds

_WIDTH = 110
"""Columns of a report that does not go to a terminal."""


def print_forecast(forecast: Forecast, file: IO[str]) -> None:
    """Print what is predicted, how certain that is, and what it rests on."""
    console = Console(file=file, highlight=False, width=None if file.isatty() else _WIDTH)
    with console.capture() as capture:
        console.print(Text(_headline(forecast), style="bold"))
        console.print(Text(f"one rank alone: {_time(forecast.alone_s)} a step"))
        console.print(_table([p for p in forecast.predictions if not p.is_whole]))
        for line in conclusions(forecast):
            console.print(Text(line))
    for line in capture.get().splitlines():  # rich fills lines up with blanks
        print(line.rstrip(), file=file)


def conclusions(forecast: Forecast) -> list[str]:
    """What follows from the predictions, and what is not known, one sentence each."""
    said = [_describe_limit(forecast.inefficient_from)]
    if any(prediction.is_whole for prediction in forecast.predictions):
        said.append(
            f"Beyond {forecast.batch:,.0f} ranks each computes the whole batch, which has fewer "
            "rows than there are ranks."
        )
    measured = [
        f"{milliseconds(step_s * 1e3)} with {ranks}"
        for ranks, step_s in sorted(forecast.measured_s.items())
    ]
    said.append(f"Measured, over the network of the runs: {', '.join(measured)}.")
    said.append(
        f"Not verified beyond {max(forecast.measured_s)} ranks: no run with more was given."
    )
    if not forecast.knows_fixed_time:
        said.append(
            "Not measured: which part of a shard's time does not depend on its rows, so that any "
            "part is taken as equally likely; a second run, with another number of ranks and the "
            "same threads for each, tells it."
        )
    if not forecast.knows_software:
        said.append(
            "Not measured: what an exchange takes beside the network, so the predictions are too "
            "low by that."
        )
    return said


def _headline(forecast: Forecast) -> str:
    threads = "threads not known" if forecast.threads is None else f"threads: {forecast.threads}"
    return (
        f"{forecast.program}, batches of {forecast.batch:,.0f}, {threads} a rank, over "
        f"{describe(forecast.network)}, exchanges: {forecast.algorithm}"
    )


def describe(network: Network) -> str:
    """The network in words."""
    rate = 1 / network.seconds_per_byte / 1e9
    where = "this host" if network.name == HERE else network.name
    shared = "" if network.processors is None else f", whose {network.processors} cores all share"
    return f"{where} ({network.latency_s * 1e6:.3g} us, {rate:.3g} GB/s{shared})"


def _table(predictions: list[Prediction]) -> Padding:
    table = Table(box=None, padding=(0, 2, 0, 0))
    heads = ["ranks", f"step ({COVERAGE:.0%} interval)", "speedup", "efficiency", *_PART_NAMES]
    for head in heads:
        table.add_column(head, justify="right")
    for one in predictions:
        efficiency = one.efficiency
        table.add_row(
            f"{one.ranks:,}",
            _time(one.step_s),
            f"{one.speedup.value:,.2f}x",
            f"{efficiency.value:.0%} ({efficiency.low:.0%} to {efficiency.high:.0%})",
            *(f"{one.shares[part]:.0%}" for part in PARTS),
        )
    return Padding(table, (1, 0, 1, 2), expand=False)


_PART_NAMES = ("shard", "alike", "comparing", "waiting", "exchange")
"""The heads of the columns of ``PARTS``."""


def _time(interval: Interval) -> str:
    """A time in seconds with its interval, in one unit."""
    unit, size = ("s", 1.0) if interval.value >= 10 else ("ms", 1e-3)
    value, low, high = (
        f"{s / size:,.0f}" if s >= 100 * size else f"{s / size:.3g}"
        for s in (interval.value, interval.low, interval.high)
    )
    return f"{value} {unit} ({low} to {high})"


def _describe_limit(limit: Interval) -> str:
    """From which number of ranks on they are not efficient."""
    if limit.low > MOST_RANKS:
        return f"Efficiency stays at {LEAST_EFFICIENCY:.0%} or more up to {MOST_RANKS:,} ranks."
    value, low, high = (
        f"{round(n):,}" if n <= MOST_RANKS else f"more than {MOST_RANKS:,}"
        for n in (limit.value, limit.low, limit.high)
    )
    interval = f"{COVERAGE:.0%} interval: {low} to {high}"
    return f"Efficiency falls below {LEAST_EFFICIENCY:.0%} at {value} ranks ({interval})."
