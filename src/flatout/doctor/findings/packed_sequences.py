"""A recurrent network goes through packed sequences time step by time step."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding

PACK = "aten::_pack_padded_sequence"


def find(case: Case) -> Finding | None:
    packs = [operator for operator in case.operators if operator.name == PACK]
    recurrent = [operator for operator in case.operators if operator.within == "recurrent"]
    share = sum(operator.share for operator in recurrent)
    if not packs or case.on_accelerator or share < MATTERS:
        return None
    calls = sum(operator.calls for operator in recurrent)
    return Finding(
        "packed-sequences",
        "a recurrent network on packed sequences",
        [
            f"recurrent networks call {calls:,.0f} operators in a step, some for each time step",
            "a padded batch can use oneDNN's layer, which takes all time steps in one call",
        ],
        share,
        "edit: put sequences of equal length into a batch (a sampler that sorts them by length), "
        "and pass such a batch without packing it",
    )
