"""The step waits for its batch."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding
from flatout.doctor.findings.workers_restarted import share_of_starts


def find(case: Case) -> Finding | None:
    _, of_starts = share_of_starts(case)
    share = case.host_share("data") - of_starts
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
    return [*named, "decode=parallel or, if there is enough memory, decode=keep (JPEG files)"]


_SETTINGS = {
    "batched": "index the arrays of the dataset once for the whole batch",
    "cache": "keep samples that are the same every epoch in memory",
    "prefetch": "load the next batches in another process",
    "workers": "load in several processes, where cores are idle",
}
