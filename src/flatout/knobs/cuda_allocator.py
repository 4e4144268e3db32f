"""The allocator of CUDA memory: segments that grow, so that less of it lies between blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
"""Understood by every torch from 2.9 on; its successor is ignored on CUDA by 2.9.1:
https://github.com/pytorch/pytorch/issues/183387."""

SUCCESSOR = "PYTORCH_ALLOC_CONF"

EXPANDABLE = "expandable_segments:True"


def match(facts: Facts) -> Match:
    """Where the user has not configured it."""
    chosen = _chosen(os.environ)
    return Match((), f"{chosen} is set already") if chosen else Match(("expandable",))


def variables(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable; none where the user has configured the allocator already."""
    return {} if _chosen(environment) else {VARIABLE: EXPANDABLE}


def apply(host: Host, setting: str) -> Undo:
    """See whether this process was started as asked; nothing can be done about it now."""
    from flatout.intercept import device

    if not device.has_cuda():
        raise RefusedError("there is no CUDA device")
    if os.environ.get(VARIABLE) != EXPANDABLE:
        raise RefusedError(f"{_chosen(os.environ) or VARIABLE} was set already")
    return lambda: None


def _chosen(environment: Mapping[str, str]) -> str | None:
    return next((name for name in (VARIABLE, SUCCESSOR) if environment.get(name)), None)


KNOB = Knob(
    name="cuda_allocator",
    summary="segments of CUDA memory that grow instead of new ones",
    settings=("expandable",),
    exactness={"expandable": "bitwise"},
    hot=False,
    platforms=("cuda",),
    card=Card(
        what=f"Starts the program with `{VARIABLE}={EXPANDABLE}`, unless the user configures the "
        "allocator: memory is mapped to the end of a segment when it is needed, so that blocks of "
        "changing sizes leave fewer holes.",
        helps="Memory that runs out although enough is free in pieces: shapes that change, "
        "batches at the limit. The speed stays about the same.",
        hurts="Memory shared between processes, and some set-ups with CUDA graphs or under WSL, "
        "where it is not supported.",
        by_hand=f"`{VARIABLE}={EXPANDABLE} python train.py`",
        sources=(
            "https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-"
            "pytorch-cuda-alloc-conf",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the allocator of CUDA memory",),
    variables=variables,
)
