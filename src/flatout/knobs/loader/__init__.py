"""The data loader: whole batches, samples from memory, a thread ahead, worker processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "loader"

MOST_WORKERS = 8
"""Beyond this a loader's own process, which collects from all of them, seldom keeps up."""


WORTH_SHARE = 0.02
"""Of the step's time, waiting for data, below which there is nothing to gain."""

PROMISING = ("batched", "cache", "prefetch", "workers")
"""Settings, those that save most first."""

SAMPLEWISE = PROMISING[1:]
"""Those for any dataset."""


def refusal(facts: Facts) -> str | None:
    """Why nothing can be gained from data that come sooner; ``None``: something may."""
    if facts.data_share is None or facts.data_share >= WORTH_SHARE:
        return None
    return f"its steps wait for data {facts.data_share:.1%} of their time"


def match(facts: Facts) -> Match:
    """Needs steps that wait for their data."""
    if (why := refusal(facts)) is not None:
        return Match((), why)
    known = facts.loader_settings
    settings = tuple(s for s in PROMISING if (s in SAMPLEWISE if known is None else s in known))
    if not settings:
        return Match((), "its loaders have workers, or samples that may not be fetched otherwise")
    return Match(settings, share=facts.data_share)


def possible(loader: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings under which the batches of a loader can come from elsewhere; its attributes."""
    from torch.utils.data import IterableDataset

    from flatout.knobs.loader.ahead import batches_drawn_early
    from flatout.knobs.loader.batched import is_of_tensors
    from flatout.knobs.loader.purity import ImpureError, examine

    dataset, collate_fn = loader.get("dataset"), loader.get("collate_fn")
    if (
        loader.get("num_workers") != 0
        or loader.get("batch_sampler") is None
        or isinstance(dataset, (list, tuple, dict, IterableDataset))
    ):
        return ()
    found = set()
    if is_of_tensors(dataset, collate_fn):
        found.add("batched")
    try:
        account = examine(dataset, collate_fn)
        if not (account.draws or account.opens):
            found.add("cache")
        batches_drawn_early(loader["batch_sampler"])
        found |= {"workers"} if account.draws else {"workers", "prefetch"}
    except ImpureError:  # the knob says so where it is turned
        pass
    return tuple(setting for setting in PROMISING if setting in found)


def apply(host: Host, setting: str) -> Undo:
    """Take the place of a method of torch's loaders, living ones too."""

    def say(what: str, why: str) -> None:
        host.events.add(what, NAME, why)

    if setting == "batched":
        from flatout.knobs.loader.batched import BatchedFetch

        return BatchedFetch(host.applied.on_failure_of(NAME)).install()
    if setting == "cache":
        from flatout.knobs.loader.cache import SampleCache

        # A comparison turns this on and off: each time, it goes on from what it knows.
        cache = host.keep(NAME, setting, lambda: SampleCache(say, host.applied.on_failure_of(NAME)))
        return cache.install()
    if not hasattr(os, "fork") or sys.platform == "darwin":
        raise RefusedError("processes cannot be forked here")

    from flatout import machine
    from flatout.knobs.loader.ahead import Ahead

    is_many = setting == "workers"
    count = worker_count(machine.usable_cores()) if is_many else 1
    return Ahead(count, say, host.applied.on_failure_of(NAME), may_draw=is_many).install()


def worker_count(cores: float) -> int:
    """How many workers a loader gets: one core is left to the program itself."""
    return max(1, min(MOST_WORKERS, int(cores) - 1))


KNOB = Knob(
    name=NAME,
    summary="whole batches at once, samples from memory, or fetched ahead by processes",
    settings=("batched", "cache", "prefetch", "workers"),
    exactness={
        **dict.fromkeys(("batched", "cache"), "bitwise"),
        "prefetch": "reordered",
        "workers": "reshuffled",
    },
    worker_settings=("workers",),
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="For loaders without workers; what has workers of its own is left alone.\n\n"
        "`batched`: a batch of a `TensorDataset`, or of subsets of one, is one `index_select` "
        "of each of its tensors, instead of one index operation for each sample and a stack.\n\n"
        "`cache`: a sample is kept in memory, up to a quarter of what is available, with a digest "
        "of what it is made of, and taken from there while that is the same.\n\n"
        "`prefetch`: a process, a fork of the program, fetches the next two batches while the step "
        "computes. A batch is handed out if its samples would be made of the same data at that "
        "moment; otherwise the program fetches it itself. Unlike the program, the process computes "
        "with one thread.\n\n"
        "`workers`: the same, with as many processes as there are cores, less one (at most "
        f"{MOST_WORKERS}), and also for datasets that draw random numbers, which are then those of "
        "the processes.\n\n"
        "For `cache`, `prefetch` and `workers`, a sample has to be a function of its index and of "
        "data that can be compared. The bytecode of `__getitem__` and of all that it calls is "
        "read for that: code that writes anything but its own local variables, or calls what is "
        "not known to be harmless, is left alone, and so are samplers that decide during the "
        "epoch, a `collate_fn`, `__getitems__`, models, generators, connections, open files, and "
        "data of more than 1 MiB that are read otherwise than by `self.data[index]`. The record "
        "says what is left alone, and why. For each batch, the data that it reads (for `prefetch` "
        "and `workers`, also the times of the files) are compared again.",
        helps="The step waits for the loader: small samples that are in memory already "
        "(`batched`), transforms of them that are the same every epoch (`cache`), reading, "
        "decoding and transforming in Python on machines with cores to spare (`prefetch`, "
        "`workers`).",
        hurts="Datasets that do next to nothing: comparing takes up to 1 ms a batch. `prefetch` "
        "and `workers` on few cores, where they take the time of the step; a program that changes "
        "its data in each step (it is left alone when more than one batch in five was in vain).",
        by_hand="`for rows in torch.randperm(len(x)).split(64): step(x[rows], y[rows])`; a list of "
        "the samples, made once; `DataLoader(..., num_workers=3, "
        "persistent_workers=True, prefetch_factor=4, pin_memory=True)`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/data.html",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
            "https://docs.python.org/3/library/dis.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the fetching of loaders",),
)
