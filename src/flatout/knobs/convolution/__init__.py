"""Run some convolutions as an equivalent matmul or a smaller convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "convolution"


def match(facts: Facts) -> Match:
    """Offer the setting where a step contains transposed convolutions."""
    if facts.lack("conv_transpose"):
        return Match((), "there are no transposed convolutions in a step")
    return Match(("recast",), share=facts.share("conv"))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operators, for every thread of this process.

    Raises:
        RefusedError: this torch is too old to replace operators.
    """
    import torch

    from flatout.knobs.convolution import cpu

    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(f"torch {torch.__version__} has no torch.library.get_kernel")
    return cpu.install(host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="run some convolutions as an equivalent matmul or a smaller convolution",
    settings=("recast",),
    exactness={"recast": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob computes three kinds of convolutions on the CPU in an equivalent form, "
        "because torch's kernels take many times longer for them than their arithmetic "
        "needs:\n\n"
        "- A transposed convolution of images of one pixel (the first layer of many "
        "generators) and a convolution whose kernel is as large as its images (the last "
        "layer of many discriminators) become a matmul, forward and backward.\n"
        "- A transposed convolution with at most four output channels (the last layer of "
        "generators and decoders) becomes a convolution followed by a pixel shuffle (Shi "
        "et al. 2016), if kernel, stride and padding allow it. The values 4, 2 and 1 do.\n"
        "- The gradient with respect to the images of a strided convolution with at most "
        "four input channels is the same computation, and is done in the same way.\n\n"
        "Torch computes all other convolutions.",
        helps="The knob helps generators and decoders: GANs, variational autoencoders, U-Nets.",
        hurts="Programs with many small convolutions become slower: each convolution takes some "
        "microseconds more, because the operator is replaced by a Python function.",
        by_hand="Write the first layer as `nn.Linear(inputs, channels * 7 * 7)` and "
        "`nn.Unflatten(1, (channels, 7, 7))`, the last one as `nn.Conv2d(inputs, 4 * channels, 3, "
        "padding=1)` and `nn.PixelShuffle(2)`.",
        sources=(
            "https://arxiv.org/abs/1609.05158 (sub-pixel convolution)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernel of aten::convolution",),
    replaces=("conv",),
)
