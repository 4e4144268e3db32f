"""The step waits for its data."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    share = case.host_share("data")
    if share < MATTERS:
        return None
    evidence = [f"a step waits {case.phases_ms['data']:.3g} ms for its batch"]
    for loader in case.facts.loaders or ():
        size = loader.batch_size  # none where a sampler makes the batches
        batches = "" if size is None else f", batches of {size}"
        evidence.append(f"a loader over {loader.dataset} has {loader.workers} workers{batches}")
    return Finding(
        "input-bound",
        "waiting for data",
        evidence,
        share,
        f"knob: {', '.join(_remedies(case))}",
    )


def _remedies(case: Case) -> list[str]:
    """Settings that one of the job's loaders can take, all where that is not known."""
    known = case.facts.loader_settings
    named = [f"loader={s} ({what})" for s, what in _SETTINGS.items() if known is None or s in known]
    return [*named, "decode=parallel or, with memory to spare, decode=keep (JPEG files)"]


_SETTINGS = {
    "batched": "rows of a TensorDataset at once",
    "cache": "samples that are the same every epoch, from memory",
    "prefetch": "the next batches by another process",
    "workers": "by several, where cores are idle",
}
