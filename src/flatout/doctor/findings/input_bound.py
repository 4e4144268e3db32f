"""The step waits for its data."""

from __future__ import annotations

from flatout.doctor.case import Case
from flatout.doctor.findings import MATTERS, Finding


def find(case: Case) -> Finding | None:
    share = case.host_share("data")
    if share < MATTERS:
        return None
    evidence = [f"a step waits {case.phases_ms['data']:.3g} ms for its batch"]
    for loader in case.facts.get("loaders", []):
        size = loader["batch_size"]  # none where a sampler makes the batches
        batches = "" if size is None else f", batches of {size}"
        evidence.append(
            f"a loader over {loader['dataset']} has {loader['workers']} workers{batches}"
        )
    return Finding(
        "input-bound",
        "waiting for data",
        evidence,
        share,
        "knob: loader=cache (samples that come out the same every epoch, from memory), "
        "loader=batched (rows of a TensorDataset), decode=parallel or, with memory to spare, "
        "decode=keep (JPEG files), loader=prefetch, or loader=workers where cores are idle",
    )
