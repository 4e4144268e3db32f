"""Random numbers: a parallel generator behind dropout and ``aten::bernoulli_``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "random"


def match(facts: Facts) -> Match:
    """Needs random numbers in the step."""
    if facts.lack("bernoulli"):
        return Match((), "its steps draw no random numbers to speak of")
    return Match(("fast",), share=facts.share("bernoulli"))


def apply(host: Host, setting: str) -> Undo:
    """Put the generator behind the operators, for every thread of this process."""
    from flatout.intercept import dispatch
    from flatout.knobs.random import cpu

    return cpu.install(
        dispatch.load_kernel("bernoulli", "torch's own numbers"),
        paired=setting == "paired",
        on_failure=host.applied.on_failure_of(NAME),
    )


KNOB = Knob(
    name=NAME,
    summary="dropout's random numbers from a parallel, vectorised generator",
    settings=("paired", "fast"),
    exactness={"paired": "resampled", "fast": "reshuffled"},
    proof_setting="paired",
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="Puts a counter-based generator (Philox4x32-7), compiled for this processor, behind "
        "`aten::bernoulli_`, which every dropout on the CPU goes through. Each call draws one key "
        "from the generator it was given, so `torch.manual_seed`, generators and saved random "
        "states keep their meaning, and the result is the same for any number of threads. "
        "Dropout of 32,768 elements or more is one pass, forward and backward, and keeps a bit an "
        "element; its probability is exact to 2^-17, and the rescaling fits it. "
        "Torch's own kernel draws one number an element, so from the first dropout on the default "
        "generator is elsewhere than without the knob, and with it the order of a shuffled loader. "
        "`paired` lets torch's kernel run as well and leaves the generator as that does: the same "
        "data in the same order, at no gain; it is there for proofs. Needs a C compiler.",
        helps="Dropout on many elements: torch's generator on the CPU is serial, and takes up to a "
        "third of a step of a small GPT.",
        hurts="Where results must be repeated number by number from a run without it. In compiled "
        "regions it does nothing: Inductor has a generator of its own.",
        by_hand="Leave dropout out (`p=0`), or `torch.compile` the module, whose generator is fast "
        "as well.",
        sources=(
            "https://doi.org/10.1145/2063384.2063405 (Philox)",
            "https://docs.pytorch.org/docs/stable/library.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the CPU kernel of aten::bernoulli_", "dropout on the CPU"),
    kernels=("bernoulli",),
)
