"""What can limit a program: one file for each kind of finding, found by looking into this folder.

Each module has ``find(case) -> Finding | None``. A finding that cannot matter here must not appear.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from flatout.doctor.case import Case, PlacedOperator

MATTERS = 0.05
"""Share of a step from which on a finding is worth a line: the spread of repeated measurements."""


@dataclass(frozen=True)
class Finding:
    """One thing that limits the program.

    Attributes:
        kind: what it is, the name of its module with hyphens.
        title: in a few words.
        evidence: what was measured, in sentences.
        share: share of the step that it explains, an upper bound of what a remedy can gain;
            ``None``: not measured.
        remedy: the knob or the edit that addresses it.
    """

    kind: str
    title: str
    evidence: list[str]
    share: float | None
    remedy: str


def listed(case: Case, wanted: Callable[[PlacedOperator], bool]) -> list[str]:
    """Evidence: the three largest of the wanted operators."""
    return [
        f"{o.name}: {o.calls:.3g} calls, {o.share:.0%} of a step"
        for o in case.operators
        if wanted(o)
    ][:3]


def kinds() -> list[str]:
    """The closed list of kinds."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def find_all(case: Case) -> list[Finding]:
    """All findings, largest share first, those without a share last."""
    found = []
    for module in pkgutil.iter_modules(__path__):
        finding = importlib.import_module(f"{__name__}.{module.name}").find(case)
        if finding is not None:
            assert finding.kind == module.name.replace("_", "-")
            found.append(finding)
    return sorted(found, key=lambda f: (f.share is None, -(f.share or 0.0), f.kind))
