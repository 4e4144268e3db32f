"""Cross entropy over many classes: loss and gradient in one pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "cross_entropy"

OPERATORS = ("log_softmax", "nll_loss")


def match(facts: Facts) -> Match:
    """Needs such a loss in the step."""
    if facts.lack(*OPERATORS):
        return Match((), "there is no cross entropy in its steps")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("fused",), share=facts.share(*OPERATORS))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator, for every thread of this process."""
    from flatout.intercept import dispatch
    from flatout.knobs.cross_entropy import cpu

    library = dispatch.load_kernel("cross_entropy", "torch's own operators")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="cross entropy over many classes, loss and gradient in one pass",
    settings=("fused",),
    exactness={"fused": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="`F.cross_entropy` on the CPU writes the logarithms of all probabilities, picks those "
        "of the targets, and in the backward pass writes a matrix of zeros and one of gradients; "
        "under autocast it copies the logits to float32 before. `fused` reads a row of logits "
        "while it is in the cache and writes its gradient at once, in the dtype of the logits; "
        "the arithmetic is float32, sums of a row are kept in float64. Taken are matrices of "
        "262,144 logits or more with classes as targets, ignored ones and label smoothing among "
        "them. Left to torch: class weights, probabilities as targets, smaller matrices, compiled "
        "regions, `torch.func`. Needs a C compiler.",
        helps="Language models with a vocabulary of thousands.",
        hurts="A gradient that is scaled before the backward pass (`(loss / n).backward()`) costs "
        "one more pass over the matrix.",
        by_hand="Nothing in torch does this on the CPU; on CUDA, Liger's fused cross entropy does.",
        sources=(
            "https://arxiv.org/abs/2410.10989 (Liger Kernel)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.cross_entropy.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("cross entropy",),
    kernels=("cross_entropy",),
)
