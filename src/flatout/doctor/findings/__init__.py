"""What can limit a program: each file of this folder is one kind of finding.

Each module has ``find(case) -> Finding | None``. It returns ``None`` if the finding cannot
matter.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from flatout.doctor.case import Case, PlacedOperator

MATTERS = 0.05
"""Smallest share of a step that is reported: the spread between repeated measurements."""

LAST = "dominant-operator"
"""The kind of finding that says where the time goes, but of nothing that is wrong."""

_SCRIPT_OPERATORS = ("torch::jit::", "<backward op>", "fallback_function")
"""How the names of events begin that only TorchScript's executor makes."""


@dataclass(frozen=True)
class Finding:
    """One thing that limits the program.

    Attributes:
        kind: the name of its module with hyphens.
        title: what limits the program, in a few words.
        evidence: what was measured, one clause each.
        share: the share of the step that it takes, and so the most that a remedy can save;
            ``None``: not measured.
        remedy: the knob or the edit that would help.
    """

    kind: str
    title: str
    evidence: list[str]
    share: float | None
    remedy: str


def describe_largest(case: Case, wanted: Callable[[PlacedOperator], bool]) -> list[str]:
    """Evidence: the three largest of the wanted operators."""
    return [
        f"{o.name}: {o.calls:.3g} calls, {o.share:.0%} of a step"
        for o in case.operators
        if wanted(o)
    ][:3]


def why_not_compiled(case: Case) -> str | None:
    """Why torch.compile is no remedy for a program, as a clause; ``None`` if it may be one."""
    if any(operator.within == "second_order" for operator in case.operators):
        return "torch.compile cannot record gradients of gradients"
    if any(operator.name.startswith(_SCRIPT_OPERATORS) for operator in case.operators):
        return "torch.compile does not compile what torch.jit.script has"
    return None


def kinds() -> list[str]:
    """All kinds of findings."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def find_all(case: Case) -> list[Finding]:
    """All findings; the largest share comes first, and findings without a share come last.

    The very last is ``LAST``.
    """
    found = []
    for module in pkgutil.iter_modules(__path__):
        finding = importlib.import_module(f"{__name__}.{module.name}").find(case)
        if finding is not None:
            assert finding.kind == module.name.replace("_", "-")
            found.append(finding)
    return sorted(found, key=lambda f: (f.share is None, -(f.share or 0.0), f.kind == LAST, f.kind))
