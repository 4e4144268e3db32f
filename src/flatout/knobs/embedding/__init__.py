"""Gradients of the tables of embedding bags, without sorting what was looked up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "embedding"

OPERATOR = "_embedding_bag_dense_backward"

PARTS = ("::sort", "::fill_", "::zero_")
"""Operators that torch's own is made of, among others."""


def match(facts: Facts) -> Match:
    """Needs such a gradient in the step."""
    if facts.lack(OPERATOR):
        return Match((), "its steps take no dense gradients of embedding bags")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("direct",), share=facts.share(OPERATOR, *PARTS))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator, for every thread of this process."""
    from flatout.intercept import dispatch
    from flatout.knobs.embedding import cpu

    library = dispatch.load_kernel("embedding", "torch's own gradients of embedding bags")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="gradients of embedding bags without sorting what was looked up",
    settings=("direct",),
    exactness={"direct": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="For the gradient of `nn.EmbeddingBag`'s table, torch sorts on the CPU what was "
        "looked up, counts for every row of the table how often it was, and clears the table on "
        "one thread. `direct` clears it on all threads, then adds the gradient of each bag where "
        "it belongs, each thread to rows of its own, in the order of the lookups. Taken are sums "
        "and means in float32 for tables of 32,768 elements or more; maxima, sparse gradients "
        "and `scale_grad_by_freq` are torch's. Needs a C compiler.",
        helps="Recommenders and click models on the CPU, with tables of which a batch touches "
        "little.",
        hurts="Nothing known.",
        by_hand="`nn.EmbeddingBag(..., sparse=True)` with `torch.optim.SparseAdam`, which steps "
        "the rows that were looked up only: another algorithm than Adam's.",
        sources=("https://docs.pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html",),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernels of embedding bags",),
    kernels=("embedding",),
)
