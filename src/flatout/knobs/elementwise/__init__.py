"""Functions of single elements for which torch takes many times as long as memory does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import kernels
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "elementwise"

OPERATORS = ("::tanh", "::gelu", "::abs")


def match(facts: Facts) -> Match:
    """Needs such a function in the step."""
    if facts.lack(*OPERATORS):
        return Match((), "its steps take no hyperbolic tangents, GELUs or complex magnitudes")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("fast",), share=facts.share(*OPERATORS))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operators, for every thread of this process."""
    from flatout.intercept import dispatch
    from flatout.knobs.elementwise import cpu

    library = dispatch.load_kernel("elementwise", "torch's own operators")
    return cpu.install(library, host.applied.on_failure_of(NAME))


KNOB = Knob(
    name=NAME,
    summary="tanh, the GELU made of it, and magnitudes of complex numbers, vectorised",
    settings=("fast",),
    exactness={"fast": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="On the CPU, torch computes few functions of single elements far slower than memory "
        'allows: `tanh`, `gelu(approximate="tanh")` with its derivative, and `abs` of complex '
        "numbers, which a spectrogram is made of. `fast` has kernels for them, compiled for this "
        "processor: `tanh` and magnitudes to two units in the last place, the GELU to sixteen. "
        "Taken are dense tensors of 32,768 elements or more in float32 and bfloat16 (complex: of "
        "float32). Needs a C compiler.",
        helps="Language models with the GELU of GPT-2, networks with `tanh`, spectrograms.",
        hurts="Many calls on small tensors: each of these operators takes the way through Python, "
        "some microseconds. In compiled regions it does nothing.",
        by_hand="`torch.compile` the module; `torch.view_as_real(z).norm(dim=-1)` for magnitudes.",
        sources=(
            "https://arxiv.org/abs/1606.08415 (GELU)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.GELU.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernels of tanh, GELU and complex abs",),
    kernels=("elementwise",),
)
