"""Convolutions that are matrix products, or have few channels to give, in another form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "convolution"


def match(facts: Facts) -> Match:
    """Needs transposed convolutions in the step."""
    if facts.lack("conv_transpose"):
        return Match((), "there are no transposed convolutions in its steps")
    return Match(("recast",), share=facts.share("conv"))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operators, for every thread of this process."""
    import torch

    from flatout.knobs.convolution import cpu

    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(f"torch {torch.__version__} cannot hand its kernels over")
    return cpu.install(host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="some convolutions as the matrix products, or as the smaller ones, that they are",
    settings=("recast",),
    exactness={"recast": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="On the CPU, some convolutions take many times as long as their arithmetic. `recast` "
        "computes them in another form: as the matrix product that it is, forward and backward, a "
        "transposed convolution of images of one pixel, with which generators begin, and a plain "
        "one whose kernel is as large as its images, with which discriminators end; as a plain "
        "convolution to the pixels of each block (Shi et al. 2016) a transposed one that gives "
        "four channels or fewer, with which generators and decoders end, where kernel, stride and "
        "padding allow it (4, 2, 1 does). The gradient of a plain convolution with a stride for "
        "images of so few channels is the same computation. All others are torch's.",
        helps="Generators and decoders: GANs, variational autoencoders, U-Nets.",
        hurts="Each convolution takes the way through Python, some microseconds.",
        by_hand="`nn.Linear(inputs, channels * 7 * 7)` and `nn.Unflatten(1, (channels, 7, 7))` "
        "for the first, `nn.Conv2d(inputs, 4 * channels, 3, padding=1)` and `nn.PixelShuffle(2)` "
        "for the last.",
        sources=(
            "https://arxiv.org/abs/1609.05158 (sub-pixel convolution)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.ConvTranspose2d.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernel of aten::convolution",),
)
