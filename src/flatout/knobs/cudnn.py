"""cuDNN's choice of kernels for convolutions: by measuring instead of by a rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.errors import RefusedError
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host


def match(facts: Facts) -> Match:
    """Needs convolutions in the step."""
    if facts.lack("convolution"):
        return Match((), "there are no convolutions in its steps")
    return Match(("benchmark",))


def apply(host: Host, setting: str) -> Undo:
    """Set the flag, which counts from the next convolution on."""
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
    summary="cuDNN measures its kernels for each shape and takes the fastest",
    settings=("benchmark",),
    exactness={"benchmark": "reordered"},
    hot=True,
    platforms=("cuda",),
    card=Card(
        what="Sets `torch.backends.cudnn.benchmark`: the first convolution of each shape tries "
        "several kernels and keeps the fastest (on ROCm, MIOpen's). Left alone where the program "
        "has set it, or asks for deterministic algorithms.",
        helps="Convolutions whose shapes stay the same.",
        hurts="Shapes that change: each new one is measured again. The choice, and with it the "
        "rounding, may differ from run to run.",
        by_hand="`torch.backends.cudnn.benchmark = True`",
        sources=(
            "https://docs.pytorch.org/docs/stable/backends.html#torch.backends.cudnn.benchmark",
            "https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("cuDNN's choice of kernels",),
)
