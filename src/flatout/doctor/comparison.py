"""Compares two diagnoses of a program: what takes longer now, and what is found only now.

A diagnosis is read as the document that ``Diagnosis.document`` makes, so that it may come from a
file that ``flatout doctor --json`` wrote on another day.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flatout.doctor import diagnose
from flatout.errors import UserError
from flatout.wire.record import RecordError, read_run
from flatout.wire.turns import PHASES

MOST_OPERATORS = 5
"""How many operators are compared: those whose time in a step changed most."""


@dataclass(frozen=True)
class Change:
    """A figure before and now; ``None`` where it was not measured.

    Attributes:
        name: of the figure.
        before, now: its values, both in the same unit.
    """

    name: str
    before: float | None
    now: float | None

    @property
    def ratio(self) -> float | None:
        """The value now divided by the value before; ``None`` if one is not known, or 0."""
        return self.now / self.before if self.before and self.now else None


@dataclass(frozen=True)
class Comparison:
    """Two diagnoses side by side.

    Attributes:
        program: the name of the program now.
        step_ms: the mean time of a step, in milliseconds.
        median_step_ms: the median.
        phases_ms: the mean time of each phase that one of them has, in milliseconds.
        operators_ms: the time in a step of the operators that changed most, in milliseconds.
        minor_faults: the minor page faults of a step.
        peak_bytes: the peak of main memory.
        appeared, gone: the kinds of findings that only one of them has.
        unlike: in what the two runs are not alike, one clause each.
    """

    program: str
    step_ms: Change
    median_step_ms: Change
    phases_ms: tuple[Change, ...]
    operators_ms: tuple[Change, ...]
    minor_faults: Change
    peak_bytes: Change
    appeared: tuple[str, ...]
    gone: tuple[str, ...]
    unlike: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The comparison as JSON types."""
        return asdict(self) | {"step_ratio": self.step_ms.ratio}


def read(path: Path) -> dict[str, Any]:
    """Read a diagnosis.

    Args:
        path: a file that ``flatout doctor --json`` wrote, or the folder of the record of a run.

    Raises:
        UserError: it is neither.
    """
    if path.is_dir():
        try:
            return diagnose(read_run(path), None).document()
        except RecordError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    try:
        document = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError:
        document = None
    if not isinstance(document, dict) or not isinstance(document.get("mean_step_ms"), int | float):
        raise UserError(
            f"{path} is neither what 'flatout doctor --json FILE' writes nor the folder of a run"
        )
    return document


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Comparison:
    """Compare two diagnoses.

    Args:
        before, now: the results of ``read``.
    """

    def change(name: str) -> Change:
        return Change(name, before.get(name), now.get(name))

    kinds = [tuple(one["kind"] for one in side.get("findings") or ()) for side in (before, now)]
    return Comparison(
        program=str(now.get("program", "")),
        step_ms=change("mean_step_ms"),
        median_step_ms=change("step_ms"),
        phases_ms=tuple(_compare_phases(before, now)),
        operators_ms=tuple(_compare_operators(before, now)),
        minor_faults=change("minor_faults_per_step"),
        peak_bytes=change("peak_rss_bytes"),
        appeared=tuple(kind for kind in kinds[1] if kind not in kinds[0]),
        gone=tuple(kind for kind in kinds[0] if kind not in kinds[1]),
        unlike=tuple(_find_unlike(before, now)),
    )


def _compare_phases(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    sides = [side.get("phases_ms") or {} for side in (before, now)]
    found = [Change(phase, sides[0].get(phase), sides[1].get(phase)) for phase in PHASES]
    return [one for one in found if one.before or one.now]


def _compare_operators(before: Mapping[str, Any], now: Mapping[str, Any]) -> Sequence[Change]:
    times_ms = [
        {one["name"]: one["share"] * side["mean_step_ms"] for one in side.get("operators") or ()}
        for side in (before, now)
    ]
    if not all(times_ms):
        return ()
    names = dict.fromkeys((*times_ms[1], *times_ms[0]))
    found = [Change(name, times_ms[0].get(name, 0.0), times_ms[1].get(name, 0.0)) for name in names]
    found.sort(key=lambda one: abs((one.now or 0.0) - (one.before or 0.0)), reverse=True)
    return found[:MOST_OPERATORS]


def _find_unlike(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = [
        f"{name} {before.get(key)} before, {now.get(key)} now"
        for key, name in (
            ("program", "program"),
            ("torch", "torch"),
            ("threads", "threads"),
            ("usable_cores", "usable cores"),
            ("dtype", "dtype"),
        )
        if None not in (before.get(key), now.get(key)) and before.get(key) != now.get(key)
    ]
    for side, when in ((before, "before"), (now, "now")):
        lost = side.get("lost_share")
        if lost is not None and lost > 0.1:
            found.append(f"other processes took {lost:.0%} of the step's time {when}")
    return found
