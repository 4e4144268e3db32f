"""Fetch whole batches at once, keep samples in memory, or prefetch batches in other processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "loader"

MOST_WORKERS = 8
"""With more workers than this, the program's main process seldom keeps up with collecting."""

WORTH_SHARE = 0.02
"""If steps wait for data for less than this share of their time, there is nothing to gain."""

PROMISING = ("batched", "cache", "prefetch", "workers")
"""The settings, those that save most first."""

SAMPLEWISE = PROMISING[1:]
"""The settings that do not depend on the class of the dataset."""


def refusal(facts: Facts) -> str | None:
    """Why faster loading would gain nothing; ``None`` if it may gain something."""
    if facts.data_share is None or facts.data_share >= WORTH_SHARE:
        return None
    return f"steps wait for data only {facts.data_share:.1%} of their time"


def match(facts: Facts) -> Match:
    """Offer the settings that fit a loader of the program, where steps wait for data."""
    if (why := refusal(facts)) is not None:
        return Match((), why)
    known = facts.loader_settings
    settings = tuple(s for s in PROMISING if (s in SAMPLEWISE if known is None else s in known))
    if not settings:
        return Match((), "its loaders have workers, or samples that only the program may fetch")
    return Match(settings, share=facts.data_share)


def possible(loader: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that can be applied to a data loader.

    Args:
        loader: the attributes of the loader, by name.
    """
    from torch.utils.data import IterableDataset

    from flatout.intercept.purity import ImpureError, examine
    from flatout.knobs.loader.ahead import batches_drawn_early
    from flatout.knobs.loader.batched import can_be_batched

    dataset, collate_fn = loader.get("dataset"), loader.get("collate_fn")
    if (
        loader.get("num_workers") != 0
        or loader.get("batch_sampler") is None
        or isinstance(dataset, (list, tuple, dict, IterableDataset))
    ):
        return ()
    found = set()
    if can_be_batched(dataset, collate_fn):
        found.add("batched")
    try:
        account = examine(dataset, collate_fn)
        if not (account.draws or account.opens):
            found.add("cache")
        batches_drawn_early(loader["batch_sampler"])
        found |= {"workers"} if account.draws else {"workers", "prefetch"}
    except ImpureError:  # the knob records the reason when it is applied
        pass
    return tuple(setting for setting in PROMISING if setting in found)


def apply(host: Host, setting: str) -> Undo:
    """Replace a method of torch's loaders, including those that exist already.

    Raises:
        RefusedError: the setting needs forked processes, which this system does not support.
    """

    def add_event(kind: str, why: str) -> None:
        host.events.add(kind, NAME, why)

    if setting == "batched":
        from flatout.knobs.loader.batched import BatchedFetch

        try:
            library = kernels.load("rows")
        except kernels.KernelError as error:
            host.events.add("noticed", NAME, f"torch copies the rows of batches: {error}")
            library = None
        return BatchedFetch(host.applied.on_failure_of(NAME), library).install()
    if setting == "cache":
        from flatout.knobs.loader.cache import SampleCache

        # A comparison applies and undoes the knob repeatedly; the samples are kept.
        cache = host.keep(
            NAME, setting, lambda: SampleCache(add_event, host.applied.on_failure_of(NAME))
        )
        return cache.install()
    if not hasattr(os, "fork") or sys.platform == "darwin":
        raise RefusedError("processes cannot be forked on this system")

    from flatout import machine
    from flatout.knobs.loader.ahead import Ahead

    is_many = setting == "workers"
    count = worker_count(machine.usable_cores()) if is_many else 1
    return Ahead(count, add_event, host.applied.on_failure_of(NAME), may_draw=is_many).install()


def worker_count(cores: float) -> int:
    """Return the number of workers of a loader; one core is left for the program itself."""
    return max(1, min(MOST_WORKERS, int(cores) - 1))


KNOB = Knob(
    name=NAME,
    summary="fetch whole batches at once, keep samples in memory, or prefetch in other processes",
    settings=("batched", "cache", "prefetch", "workers"),
    exactness={
        **dict.fromkeys(("batched", "cache"), "bitwise"),
        "prefetch": "reordered",
        "workers": "reshuffled",
    },
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="The knob changes how data loaders without workers fetch their batches. It does "
        "not change loaders with workers, nor datasets that are a list, a tuple, a dict "
        "or iterable-style.\n\n"
        "`batched`: a batch of a `TensorDataset`, or of a dataset of the program whose "
        "`__getitem__` only takes rows of tensors, of NumPy arrays or of lists "
        "(`return self.x[i : i + self.length], self.y[i]`), is fetched by one index operation on "
        "each of them, instead of by indexing each sample and stacking the samples. So is a batch "
        "of a `Subset` or `ConcatDataset` of such. The knob reads this from the bytecode of "
        "`__getitem__`, and compares the first two batches with those that torch fetches.\n\n"
        "`cache`: samples are kept in memory, up to a quarter of the memory that is "
        "available. Each sample is stored with a digest of the data and code that it was "
        "computed from, and is reused as long as the digest is the same. Datasets that "
        "draw random numbers or read files are not cached.\n\n"
        "`prefetch`: a forked process fetches the next two batches while the step "
        "computes. The program gets such a batch only if the data that it was computed "
        "from have not changed; otherwise the program fetches the batch itself. Datasets "
        "that draw random numbers are not prefetched. The process computes with one "
        "thread, which may change the order in which a transform adds up numbers. The "
        "setting therefore belongs to the class reordered.\n\n"
        "`workers`: as `prefetch`, with one process for each core but one (at most "
        f"{MOST_WORKERS}). Datasets that draw random numbers are allowed. The numbers are "
        "then drawn from the random generators of the worker processes.\n\n"
        "For `cache`, `prefetch` and `workers`, a sample must depend only on its index and on "
        "data that flatout can check for changes (with `workers`, also on random numbers). The "
        "knob checks "
        "this in the bytecode of `__getitem__` and of everything that it calls. It does "
        "not change a dataset if this code\n\n"
        "- writes anything but its own local variables,\n"
        "- calls functions that are not known to be free of side effects,\n"
        "- uses `__getitems__`, a model, a Python generator, a random generator of its own (such "
        "as a `torch.Generator`), a connection to a socket or a database, or a file that is "
        "open already, or\n"
        "- reads more than 1 MiB of data in any other way than `self.data[index]`.\n\n"
        "Nor does it change loaders with a `collate_fn` of the program. The record that flatout "
        "writes of each run lists what was left alone, and why.\n\n"
        "For `prefetch` and `workers`, the sampler must be an unmodified "
        "`SequentialSampler`, `RandomSampler`, `WeightedRandomSampler` or "
        "`DistributedSampler` of torch, in a plain `BatchSampler`. The sampler must also "
        "fix its order at the start of the epoch. This excludes "
        "`RandomSampler(replacement=True)` with a `torch.Generator` of the program. `cache` "
        "accepts any sampler that returns integers.\n\n"
        "For each batch, the knob checks that the data from which the batch was computed have "
        "not changed; for `prefetch` and `workers` it also checks the modification times of "
        "the files that were read for the batch.",
        helps="The knob helps steps that wait for the loader. `batched` helps with small "
        "samples that are in memory already; `cache` with transforms that give the same "
        "result in every epoch; `prefetch` and `workers` with reading, decoding and "
        "transforming in Python, on machines with spare cores.",
        hurts="Datasets that do very little become slower, because comparing their data takes "
        "up to 1 ms per batch. On few cores, `prefetch` and `workers` slow down the step. "
        "If a program changes its data at each step, batches are fetched in vain; if that "
        "happens to more than one batch in five, the knob stops prefetching that dataset.",
        by_hand="Fetch whole batches: `for rows in torch.randperm(len(x)).split(64): "
        "step(x[rows], y[rows])`; build a list of the samples once; or use "
        "`DataLoader(..., num_workers=3, persistent_workers=True, prefetch_factor=4, "
        "pin_memory=True)`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/data.html",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
            "https://docs.python.org/3/library/dis.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    shares_cpus=True,
    background_settings=("workers",),
    claims=("the fetching of loaders",),
    kernels=("rows",),
    memory_settings=("cache",),
)
