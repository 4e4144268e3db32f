"""Let segments of CUDA memory grow, so that less memory is lost to fragmentation."""

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
"""Every torch from 2.9 on reads this variable; torch 2.9.1 ignores its successor on CUDA:
https://github.com/pytorch/pytorch/issues/183387."""

SUCCESSOR = "PYTORCH_ALLOC_CONF"

EXPANDABLE = "expandable_segments:True"


def match(facts: Facts) -> Match:
    """Offer the setting unless the user has configured the allocator."""
    chosen = _variable_in_use(os.environ)
    return Match((), f"{chosen} is set already") if chosen else Match(("expandable",))


def variables(setting: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable to set; none where the user has configured the allocator already."""
    return {} if _variable_in_use(environment) else {VARIABLE: EXPANDABLE}


def apply(host: Host, setting: str) -> Undo:
    """Check that this process was started with the variable; it is read only at the start."""
    from flatout.intercept import device

    if not device.has_cuda():
        raise RefusedError("there is no CUDA device")
    if os.environ.get(VARIABLE) != EXPANDABLE:
        raise RefusedError(f"{_variable_in_use(os.environ) or VARIABLE} was set already")
    return lambda: None


def _variable_in_use(environment: Mapping[str, str]) -> str | None:
    return next((name for name in (VARIABLE, SUCCESSOR) if environment.get(name)), None)


KNOB = Knob(
    name="cuda_allocator",
    summary="let segments of CUDA memory grow instead of allocating new ones",
    settings=("expandable",),
    exactness={"expandable": "bitwise"},
    hot=False,
    platforms=("cuda",),
    card=Card(
        what=f"The knob starts the program with `{VARIABLE}={EXPANDABLE}`, unless the user has "
        "configured the allocator. If the allocator needs more memory, it then maps it to "
        "the end of an existing segment, so blocks of varying sizes leave fewer gaps.",
        helps="The knob helps programs that run out of memory because of fragmentation: their "
        "shapes change, or their batches nearly fill the memory. The speed stays about "
        "the same.",
        hurts="Expandable segments are not supported in programs that share CUDA memory between "
        "processes, in some programs with CUDA graphs, and under WSL.",
        by_hand=f"Start the program with `{VARIABLE}={EXPANDABLE} python train.py`.",
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
