"""Compute cross entropy over many classes, loss and gradient, in one pass over the logits."""

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
    """Offer the setting where a step computes cross entropy."""
    if facts.lack(*OPERATORS):
        return Match((), "there is no cross entropy in a step")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("fused",), share=facts.share(*OPERATORS))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator, for every thread of this process.

    Raises:
        RefusedError: the kernel cannot be built, or this torch is too old to replace operators.
    """
    from flatout.intercept import dispatch
    from flatout.knobs.cross_entropy import cpu

    library = dispatch.load_kernel("cross_entropy", "torch's own operators")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="compute cross entropy over many classes, loss and gradient, in one pass",
    settings=("fused",),
    exactness={"fused": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces `F.cross_entropy` on the CPU by a kernel that is compiled for "
        "this processor. Torch writes the logarithms of all probabilities, picks those of "
        "the targets, and in the backward pass writes a matrix of zeros and one of "
        "gradients. Under autocast, it first copies the logits to float32. `fused` reads "
        "each row of logits while it is in the cache and writes its gradient at once, in "
        "the dtype of the logits. It computes in float32, and sums over a row in float64.\n\n"
        "The kernel handles matrices of at least 262,144 logits whose targets are class "
        "indices, with `ignore_index` and label smoothing. Torch computes smaller "
        "matrices, class weights, probabilities as targets, compiled regions and "
        "`torch.func`. The knob needs a C compiler.",
        helps="The knob helps language models with a vocabulary of thousands of tokens.",
        hurts="The knob gains less if the loss is scaled before the backward pass (`(loss / "
        "n).backward()`), because scaling the gradient takes one more pass over the "
        "matrix.",
        by_hand="Torch has no equivalent on the CPU; on CUDA, use Liger's fused cross entropy.",
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
    replaces=OPERATORS,
)
