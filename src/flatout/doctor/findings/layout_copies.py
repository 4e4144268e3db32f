"""Copies between memory formats around convolutions."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import Finding

COPIES_MATTER = 0.1
"""Some copying is part of any model; more of it beside convolutions points at their layout."""


def find(case: Case) -> Finding | None:
    kinds = case.facts.get("modules", {}).get("kinds", {})
    if not any(name.startswith("Conv") for name in kinds):
        return None
    share = case.operators_share(lambda name: name in ("aten::copy_", "aten::_to_copy"))
    if share < COPIES_MATTER:
        return None
    calls = sum(o["calls"] for o in case.operators if o["name"] == "aten::copy_")
    return Finding(
        "layout-copies",
        "copies around convolutions",
        [f"{calls:.3g} copies a step in a model with convolutions"],
        share,
        "edit: model.to(memory_format=torch.channels_last), and the inputs likewise",
    )
