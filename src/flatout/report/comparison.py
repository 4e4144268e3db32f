"""Prints the comparison of two diagnoses on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import IO

from flatout.doctor.comparison import Change, Comparison
from flatout.tune.formatting import NOT_MEASURED, memory, milliseconds

LITTLE = 0.02
"""A change below this share is printed as none."""


def print_comparison(comparison: Comparison, file: IO[str]) -> None:
    """Print the verdict first, then the phases, the operators and the other figures."""
    print(f"{comparison.program}: {_describe(comparison.step_ms)}", file=file)
    for clause in comparison.unlike:
        print(f"not alike: {clause}", file=file)
    times = [comparison.median_step_ms, *comparison.phases_ms, *comparison.operators_ms]
    rows = [("", "before", "now", "change")]
    rows += [_row(one, milliseconds, _NAMES.get(one.name, one.name)) for one in times]
    rows.append(_row(comparison.minor_faults, "{:,.0f}".format, "minor page faults"))
    rows.append(_row(comparison.peak_bytes, memory, "peak memory"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, before, now, change in rows:
        line = f"  {name:{widths[0]}}  {before:>{widths[1]}}  {now:>{widths[2]}}  {change}"
        print(line.rstrip(), file=file)
    _print_kinds("found only now", comparison.appeared, file)
    _print_kinds("found only before", comparison.gone, file)


_NAMES = {"step_ms": "step (median)"}


def _describe(step_ms: Change) -> str:
    assert step_ms.before is not None
    assert step_ms.now is not None
    times = f"a step takes {milliseconds(step_ms.now)}, {milliseconds(step_ms.before)} before"
    ratio = step_ms.ratio
    if ratio is None or abs(ratio - 1) < LITTLE:
        return f"{times}: just as long"
    return f"{times}: {ratio:.2f}x as long"


def _row(change: Change, show: Callable[[float], str], name: str) -> tuple[str, str, str, str]:
    before, now = (
        NOT_MEASURED if value is None else show(value) for value in (change.before, change.now)
    )
    ratio = change.ratio
    if ratio is None:
        return name, before, now, ""
    if abs(ratio - 1) < LITTLE:
        return name, before, now, "="
    return name, before, now, f"{ratio - 1:+.0%}" if 0.5 < ratio < 2 else f"{ratio:.2g}x"


def _print_kinds(words: str, kinds: Sequence[str], file: IO[str]) -> None:
    if kinds:
        print(f"{words}: {', '.join(kinds)}", file=file)
