"""Dropout's random numbers, which torch draws one by one on a CPU."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

RANDOM_OPERATORS = (
    *("aten::bernoulli_", "aten::normal_", "aten::uniform_", "aten::random_"),
    *("aten::exponential_", "aten::randperm", "aten::native_dropout"),
)


def find(case: Case) -> Finding | None:
    share = case.operators_share(lambda name: name in RANDOM_OPERATORS)
    if case.on_accelerator or share < MATTERS:
        return None
    drawn = [o for o in case.operators if o["name"] in RANDOM_OPERATORS]
    return Finding(
        "slow-random-numbers",
        "random numbers drawn one by one",
        [f"{o['name']}: {o['calls']:.3g} calls, {o['self_ms']:.3g} ms a step" for o in drawn[:3]],
        share,
        "edit: less dropout, or none where the data suffices (torch's CPU generator is serial)",
    )
