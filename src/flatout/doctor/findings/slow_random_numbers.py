"""On a CPU, torch draws random numbers (mostly those of dropout) one by one."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding, describe_largest

RANDOM_OPERATORS = frozenset(
    {
        *("aten::bernoulli_", "aten::normal_", "aten::uniform_", "aten::random_"),
        *("aten::exponential_", "aten::randperm", "aten::native_dropout", "aten::log_normal_"),
    }
)


def find(case: Case) -> Finding | None:
    share = case.operators_share(lambda o: o.name in RANDOM_OPERATORS)
    if case.on_accelerator or share < MATTERS:
        return None
    return Finding(
        "slow-random-numbers",
        "random numbers drawn one by one",
        describe_largest(case, lambda o: o.name in RANDOM_OPERATORS),
        share,
        "knob: random=fast (torch's generator is serial on a CPU)",
    )
