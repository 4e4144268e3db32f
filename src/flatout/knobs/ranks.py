"""Run the program as several processes that share out its batches."""

from __future__ import annotations

import multiprocessing
import os
from typing import TYPE_CHECKING

from flatout import machine
from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match
from flatout.machine import accelerators, cores

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "ranks"

LEAST_COST_MS = 1.0
"""The least time that ranks add to a step: they compare inputs, meet before a call and after it,
gather its outputs and average gradients."""

LEAST_RANK_BYTES = 200 << 20
"""What each further rank needs at least: torch 2.13 for CPUs takes 218 MiB when it is imported."""


def match(facts: Facts) -> Match:
    """Offer the numbers of ranks that cores or accelerators suggest, for a program of one
    process."""
    if facts.is_distributed:
        return Match((), "the program consists of several processes already")
    if facts.calls_modules is False:
        return Match((), "the program calls no module, so there is nothing to share out")
    if facts.isolation_refusal is not None:
        return Match((), f"all ranks would write to your files: {facts.isolation_refusal}")
    tried = ("per_node", "2") if facts.device == "cpu" else ("per_gpu",)
    settings: dict[int, str] = {}
    for setting in tried:
        if find_refusal(setting) is None:
            settings.setdefault(number(setting), setting)
    if not settings:
        return Match((), find_refusal(tried[-1]))
    spare_bytes = facts.spare_memory_bytes
    if spare_bytes is not None:
        settings = {n: s for n, s in settings.items() if (n - 1) * LEAST_RANK_BYTES <= spare_bytes}
    if not settings:
        return Match((), "each further rank needs more memory than --memory allows a plan")
    share = None
    if facts.module_share is not None and facts.step_ms:
        share = facts.module_share * (1 - 1 / max(settings)) - LEAST_COST_MS / facts.step_ms
        if share <= 0:
            module_ms = facts.module_share * facts.step_ms
            return Match(
                (),
                f"its forward and backward passes take {module_ms:.2g} ms a step, too little to be "
                "shared out",
            )
    return Match(tuple(settings.values()), share=share)


def number(setting: str) -> int:
    """The number of ranks that a setting means on this machine."""
    if setting == "per_gpu":
        return accelerators.count(accelerators.visible(os.environ))
    return len(_nodes()) if setting == "per_node" else int(setting)


def find_refusal(setting: str) -> str | None:
    """Return why this machine cannot run as many ranks as a setting means; ``None``: it can."""
    ranks = number(setting)
    if ranks < 2:
        is_per_node = setting == "per_node"
        return "all cores are in one NUMA node" if is_per_node else "there is one GPU at most"
    usable = min(sum(map(len, _nodes())), int(machine.usable_cores()))
    if ranks > usable:
        return f"{ranks} ranks need {ranks} cores, and {usable} may be used"
    return None


def find_launcher() -> str | None:
    """Return that a launcher has made several processes of the program; ``None``: none has."""
    from flatout.parallel.place import launched_processes

    processes = launched_processes()
    return None if processes == 1 else f"it is one of {processes} processes: WORLD_SIZE is set"


def _nodes() -> list[cores.Node]:
    return cores.nodes(cores.allowed_processors())


def apply(host: Host, setting: str) -> Undo:
    """Check that this process was started as a rank. The session then shares out its root calls
    (``flatout.parallel``), inside of all other knobs.

    Raises:
        RefusedError: it was not, or a launcher in the job has started several processes.
    """
    from flatout import parallel
    from flatout.parallel.place import place

    if place() is None:
        raise RefusedError("the program was not started as several ranks")
    refusal = find_launcher()
    if refusal is not None:
        raise RefusedError(refusal)
    if multiprocessing.parent_process() is not None:
        host.events.add("unused", NAME, "children of multiprocessing compute by themselves")
    return parallel.leave


KNOB = Knob(
    name=NAME,
    summary="run the program as several processes that share out its batches",
    settings=("2", "per_node", "per_gpu"),
    exactness={"2": "reordered", "per_node": "reordered", "per_gpu": "reordered"},
    hot=False,
    platforms=("cpu", "cuda", "xpu"),
    card=Card(
        what="The knob runs the whole program several times at once, each copy (a *rank*) on its "
        "share of the cores: twice (`2`), once for each NUMA node (`per_node`), or once for each "
        "GPU, which is the only one that it sees (`per_gpu`). The ranks share out the batch of "
        "each outermost module call, gather its outputs, and average the "
        "gradients after each backward call. Batch size, number of steps, random numbers, output "
        "and files are those of the program alone; sums are taken in another order. Calls that "
        "cannot be shared out are computed whole by every rank.\n\n"
        "A trial fails if the ranks do not stay the same, and has no effect if no call can be "
        "shared out. A run with a plan then goes on as one process, and says so. The guide "
        "to `--ranks` has the details and the limits.",
        helps="The knob helps if forward and backward passes take most of a step of 50 ms or more "
        "and leave cores idle: their threads wait for each other, their operators are small, or "
        "the memory of several NUMA nodes is used. On two cores, one process with two threads is "
        "usually as fast.",
        hurts="Every rank has its own copy of the program in memory: model, optimizer state and "
        "data. The peak memory of all ranks counts, so a tune usually needs `--memory 2` or more "
        "to choose this knob. Data loading, Python, the loss and the optimizer's step do not get "
        "faster, and small steps get slower. The knob cannot be combined with `gradients`.",
        by_hand="Run `flatout run --ranks 2 -- python train.py`. With torch alone, start the "
        "program by `torchrun`, wrap the model in `DistributedDataParallel`, give each process its "
        "part of the data by a `DistributedSampler`, and adapt batch size, logging and "
        "checkpoints.",
        sources=(
            "https://docs.pytorch.org/docs/stable/notes/ddp.html",
            "https://docs.pytorch.org/docs/stable/distributed.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the choice of gradients",),
    background_settings=("2", "per_node", "per_gpu"),
    memory_settings=("2", "per_node", "per_gpu"),
)
