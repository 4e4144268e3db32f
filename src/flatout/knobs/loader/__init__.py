"""The data loader: whole batches, samples from memory, a thread ahead, worker processes."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from flatout.knobs import Card, Facts, Knob, Match, Undo

if TYPE_CHECKING:
    from flatout.agent.session import Session
    from flatout.knobs.loader.cache import SampleCache

NAME = "loader"

MOST_WORKERS = 8
"""Beyond this a loader's own process, which collects from all of them, seldom keeps up."""


WORTH_SHARE = 0.02
"""Of the step's time, waiting for data, below which there is nothing to gain."""

TENSOR_DATASET = "TensorDataset"


def refusal(facts: Facts) -> str | None:
    """Why nothing can be gained from data that come sooner; ``None``: something may."""
    if facts.data_share is None or facts.data_share >= WORTH_SHARE:
        return None
    return f"its steps wait for data {facts.data_share:.1%} of their time"


def match(facts: Facts) -> Match:
    """Needs steps that wait for their data."""
    if (why := refusal(facts)) is not None:
        return Match((), why)
    settings: tuple[str, ...] = ("cache", "prefetch", "workers")
    if TENSOR_DATASET in (facts.datasets or ()):
        settings = ("batched", *settings)
    return Match(settings, share=facts.data_share)


_caches: weakref.WeakKeyDictionary[Session, SampleCache] = weakref.WeakKeyDictionary()


def apply(session: Session, setting: str) -> Undo:
    """Take the place of a method of torch's loaders, living ones too."""

    def say(what: str, why: str) -> None:
        session.event(what, NAME, why)

    if setting == "batched":
        from flatout.knobs.loader.batched import BatchedFetch

        return BatchedFetch(session.turns_back(NAME)).install()
    if setting == "cache":
        from flatout.knobs.loader.cache import SampleCache

        # A comparison turns this on and off: each time, it goes on from what it knows.
        if session not in _caches:
            _caches[session] = SampleCache(say, session.turns_back(NAME))
        return _caches[session].install()
    if setting == "prefetch":
        from flatout.knobs.loader.prefetch import Prefetch

        return Prefetch(say).install()

    from flatout import machine
    from flatout.knobs.loader.workers import Workers

    return Workers(worker_count(machine.usable_cores()), say).install()


def worker_count(cores: float) -> int:
    """How many workers a loader gets: one core is left to the program itself."""
    return max(1, min(MOST_WORKERS, int(cores) - 1))


KNOB = Knob(
    name=NAME,
    summary="whole batches at once, samples from memory, fetched ahead, or by worker processes",
    settings=("batched", "cache", "prefetch", "workers"),
    exactness={
        **dict.fromkeys(("batched", "cache"), "bitwise"),
        **dict.fromkeys(("prefetch", "workers"), "reshuffled"),
    },
    hot=True,
    platforms=("cpu", "cuda", "xpu", "mps"),
    card=Card(
        what="`batched`: a batch of a `TensorDataset`, or of subsets of one, is one `index_select` "
        "of each of its tensors, instead of one index operation for each sample and a stack. "
        "Loaders with workers, or with a `collate_fn`, and other datasets are left alone.\n\n"
        "`cache`: a map-style dataset whose samples come out the same to the last bit when "
        "the next epoch fetches them again is from then on read from memory, up to a quarter of "
        "what is available. One sample of each batch is still fetched and compared; when it "
        "differs, or the dataset has drawn a random number, the batch and all that follow are "
        "fetched as ever. Loaders with workers are left alone.\n\n"
        "`prefetch`: for loaders without workers, a thread fetches the next two batches while the "
        "step computes. Datasets that draw random numbers are left alone.\n\n"
        "`workers`: loaders without workers get as many as there are cores, less one (at most "
        f"{MOST_WORKERS}), each four batches ahead; workers live on from one epoch to the next, "
        "unless something was set on the dataset meanwhile; on CUDA, batches are pinned. Iterable "
        "datasets are left alone.\n\n"
        "The order of the data and the random numbers of the program stay as they are for datasets "
        "that are deterministic. With `workers`, random transforms draw from the workers' "
        "generators instead of the program's.",
        helps="The step waits for the loader: small samples that are in memory already "
        "(`batched`), decoding and transforming every epoch anew (`cache`), reading and decoders "
        "that release the interpreter lock (`prefetch`), "
        "transforms in Python on machines with cores to spare (`workers`).",
        hurts="`workers` on few cores, where they take the time of the step. `prefetch` and "
        "`workers` with a dataset or sampler that looks at the state of the training: it is "
        "asked earlier. A dataset whose samples differ by a generator of its own less often than "
        "once in 64 may be kept by `cache`.",
        by_hand="`for rows in torch.randperm(len(x)).split(64): step(x[rows], y[rows])`; a list of "
        "the samples, made once; `DataLoader(..., num_workers=3, "
        "persistent_workers=True, prefetch_factor=4, pin_memory=True)`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/data.html",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the fetching of loaders",),
)
