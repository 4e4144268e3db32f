"""Tensors are copied around convolutions because their memory formats do not match."""

from __future__ import annotations

from flatout.doctor.case import CONVOLUTION_OPERATORS, Case
from flatout.doctor.findings import Finding, describe_largest

COPIES_MATTER = 0.1
"""Smallest share that is reported: every model copies something."""


def find(case: Case) -> Finding | None:
    convolves = any(o.name in CONVOLUTION_OPERATORS for o in case.operators)
    if case.on_accelerator:  # its copies are those from and to the host as well
        return None
    if not convolves or case.main_dtype != "float32":  # with autocast, the copies are casts
        return None
    share = case.operators_share(lambda o: o.name == "aten::copy_" and o.is_large)
    if share < COPIES_MATTER:
        return None
    last = case.facts.modules.convolutions_channels_last
    evidence = describe_largest(case, lambda o: o.name == "aten::copy_")
    if last is not None:
        evidence.append(f"{last} convolutions have weights in channels_last")
    return Finding(
        "layout-copies",
        "copies around convolutions",
        evidence,
        share,
        "knob: memory_format=channels_last (keeps one format between all convolutions)",
    )
