"""Compute the weight gradients of embedding bags without sorting the indices."""

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
"""Operators that torch's kernel calls, and other operators as well."""


def match(facts: Facts) -> Match:
    """Offer the setting where a step computes such a gradient."""
    if facts.lack(OPERATOR):
        return Match((), "no step computes dense gradients of embedding bags")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("direct",), share=facts.share(OPERATOR, *PARTS))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator, for every thread of this process.

    Raises:
        RefusedError: the kernel cannot be built, or this torch is too old to replace operators.
    """
    from flatout.intercept import dispatch
    from flatout.knobs.embedding import cpu

    library = dispatch.load_kernel("embedding", "torch's own gradients of embedding bags")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="compute gradients of embedding bags without sorting the indices",
    settings=("direct",),
    exactness={"direct": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces the kernel that computes the gradient of `nn.EmbeddingBag`'s "
        "weight on the CPU. Torch sorts the indices, counts how often each row of the "
        "weight was looked up, and zeroes the gradient on one thread. `direct` zeroes the "
        "gradient on all threads, and then adds the gradient of each bag to the rows that "
        "the bag looked up. Each thread writes its own rows, in the order of the indices. "
        "The kernel handles the modes `sum` and `mean` in float32 for weights of at least "
        "32,768 elements. Torch computes the mode `max`, sparse gradients and "
        "`scale_grad_by_freq`. The knob needs a C compiler.",
        helps="The knob helps recommenders and click models on the CPU in which a batch looks "
        "up few rows of the weight.",
        hurts="No case is known.",
        by_hand="Use `nn.EmbeddingBag(..., sparse=True)` with `torch.optim.SparseAdam`. It updates "
        "only the rows that were looked up, so it is a different algorithm from Adam.",
        sources=("https://docs.pytorch.org/docs/stable/generated/torch.nn.EmbeddingBag.html",),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernels of embedding bags",),
    kernels=("embedding",),
    replaces=(OPERATOR,),
)
