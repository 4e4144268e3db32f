"""Set how many threads torch uses inside an operator."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "threads"
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def match(facts: Facts) -> Match:
    """Offer each setting that means another number of threads than torch uses now."""
    cores = usable_cores()
    settings: dict[int, str] = {}
    for setting in ("one", "all", "half"):
        settings.setdefault(number(setting, cores), setting)
    settings.pop(facts.threads or 0, None)
    offered = tuple(name for name in ("all", "half", "one") if name in settings.values())
    return Match(offered, None if offered else "one core is available, and torch uses one thread")


def apply(host: Host, setting: str) -> Undo:
    """Set the number of threads; a number that the program sets later stays.

    Raises:
        RefusedError: the environment sets the number.
    """
    import torch

    set_by_user = [name for name in VARIABLES if name in os.environ]
    if set_by_user:
        raise RefusedError(f"the environment sets {' and '.join(set_by_user)}")
    before = torch.get_num_threads()
    wanted = number(setting, usable_cores())
    torch.set_num_threads(wanted)

    def undo() -> None:
        if torch.get_num_threads() == wanted:
            torch.set_num_threads(before)

    return undo


def number(setting: str, cores: int) -> int:
    """The number of threads that a setting means on a machine with ``cores`` cores."""
    return {"one": 1, "half": max(cores // 2, 1), "all": cores}[setting]


def usable_cores() -> int:
    """The whole cores that this process may run on, at least 1."""
    from flatout import machine

    return max(math.floor(machine.usable_cores()), 1)


KNOB = Knob(
    name=NAME,
    summary="set the number of intra-op threads to all available logical CPUs, to half, or to one",
    settings=("one", "half", "all"),
    exactness={"one": "reordered", "half": "reordered", "all": "reordered"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob sets torch's number of intra-op threads to the number of logical CPUs that "
        "the process may use (by affinity and cgroup quota; with hyper-threading, each physical "
        "core counts as two), to half of it, or to one. "
        "It does nothing if `OMP_NUM_THREADS` or `MKL_NUM_THREADS` is set. If the program "
        "sets a number later, that number is used.",
        helps="`all` helps in containers that may use fewer cores than the machine has, because "
        "torch starts one thread for each core of the machine. `half` helps on processors with "
        "two hyper-threads per physical core, which share its arithmetic units. `one` helps with "
        "small operators, for which distributing the work takes longer than doing it, or if "
        "several processes run on one machine. A gain counts only where other processes are known "
        "to leave the CPUs alone: beside other work, fewer threads look better than they are.",
        hurts="Too few threads leave cores idle. Sums are divided differently among the "
        "threads, so results differ by rounding errors.",
        by_hand="Call `torch.set_num_threads(n)`, or run `OMP_NUM_THREADS=n python train.py`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the number of threads",),
    shares_cpus=True,
    needs_quiet=True,
)
