"""Let cuDNN choose its convolution kernels by timing them instead of by a heuristic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host


def match(facts: Facts) -> Match:
    """Offer the setting where a step contains convolutions."""
    if facts.lack("convolution"):
        return Match((), "there are no convolutions in a step")
    return Match(("benchmark",))


def apply(host: Host, setting: str) -> Undo:
    """Set the flag; it takes effect from the next convolution on.

    Raises:
        RefusedError: there is no cuDNN, or the program has made this choice itself.
    """
    import torch

    from flatout.intercept import device

    cudnn = torch.backends.cudnn
    if not device.has_cuda() or not cudnn.is_available():
        raise RefusedError("there is no cuDNN")
    if cudnn.benchmark:
        raise RefusedError("the program has set torch.backends.cudnn.benchmark itself")
    if cudnn.deterministic or torch.are_deterministic_algorithms_enabled():
        raise RefusedError("the program asks for deterministic algorithms")
    cudnn.benchmark = True

    def undo() -> None:
        cudnn.benchmark = False

    return undo


KNOB = Knob(
    name="cudnn",
    summary="let cuDNN time its kernels for each shape and keep the fastest",
    settings=("benchmark",),
    exactness={"benchmark": "reordered"},
    hot=True,
    platforms=("cuda",),
    card=Card(
        what="The knob sets `torch.backends.cudnn.benchmark`: the first convolution of each "
        "shape times several kernels, and later convolutions of that shape use the "
        "fastest (on ROCm, MIOpen does the same). The knob does nothing if the program "
        "has set the flag or asks for deterministic algorithms.",
        helps="The knob helps convolutions whose shapes stay the same.",
        hurts="If shapes change, each new shape is timed again. The choice of kernel, and with "
        "it the rounding errors, may differ from run to run.",
        by_hand="Set `torch.backends.cudnn.benchmark = True`.",
        sources=(
            "https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.benchmark",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("cuDNN's choice of kernels",),
)
