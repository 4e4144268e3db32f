"""How many threads an operator of torch takes."""

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
    """Each number that is another one than torch's now."""
    cores = usable_cores()
    settings: dict[int, str] = {}
    for setting in ("one", "all", "half"):
        settings.setdefault(number(setting, cores), setting)
    settings.pop(facts.threads or 0, None)
    offered = tuple(name for name in ("all", "half", "one") if name in settings.values())
    return Match(offered, None if offered else "there is one core to be had, and one thread")


def apply(host: Host, setting: str) -> Undo:
    """Set the number, unless the environment does; what the program sets later holds."""
    import torch

    chosen = [name for name in VARIABLES if name in os.environ]
    if chosen:
        raise RefusedError(f"{' and '.join(chosen)} is set: the number stays")
    before = torch.get_num_threads()
    wanted = number(setting, usable_cores())
    torch.set_num_threads(wanted)

    def undo() -> None:
        if torch.get_num_threads() == wanted:
            torch.set_num_threads(before)

    return undo


def number(setting: str, cores: int) -> int:
    """How many threads a setting means."""
    return {"one": 1, "half": max(cores // 2, 1), "all": cores}[setting]


def usable_cores() -> int:
    """Cores this process may run on, in whole numbers."""
    from flatout.machine import usable_cores as measured

    return max(math.floor(measured()), 1)


KNOB = Knob(
    name=NAME,
    summary="as many threads for an operator as there are cores to be had, or fewer",
    settings=("one", "half", "all"),
    exactness={"one": "reordered", "half": "reordered", "all": "reordered"},
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="Sets torch's number of intra-op threads to all cores that the process may use "
        "(affinity and cgroup quota), to half of them, or to one. A number that the environment "
        "sets (`OMP_NUM_THREADS`, `MKL_NUM_THREADS`) or that the program sets itself holds.",
        helps="`all`: torch takes one thread for each core of the machine where a container may "
        "use fewer, and they wait for each other. `half`: two threads of one core share its "
        "arithmetic units. `one`: small operators, where handing out the work takes longer than "
        "doing it, or several processes on one machine.",
        hurts="Too few threads leave cores idle. Sums are split differently, so results differ in "
        "their rounding.",
        by_hand="`torch.set_num_threads(n)`, or `OMP_NUM_THREADS=n python train.py`",
        sources=(
            "https://docs.pytorch.org/docs/stable/notes/cpu_threading_torchscript_inference.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the number of threads",),
)
