"""Draw the random numbers of dropout and ``aten::bernoulli_`` with a parallel generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "random"


def match(facts: Facts) -> Match:
    """Offer the faster setting where a step draws Bernoulli numbers."""
    if facts.lack("bernoulli"):
        return Match((), "no step draws Bernoulli random numbers")
    return Match(("fast",), share=facts.share("bernoulli"))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operators, for every thread of this process.

    Raises:
        RefusedError: the kernel cannot be built, or this torch is too old to replace operators.
    """
    from flatout.intercept import dispatch
    from flatout.knobs.random import cpu

    return cpu.install(
        dispatch.load_kernel("bernoulli", "torch's own numbers"),
        paired=setting == "paired",
        on_failure=host.applied.on_failure_of(NAME),
    )


KNOB = Knob(
    name=NAME,
    summary="draw dropout's random numbers with a parallel, vectorised generator",
    settings=("paired", "fast"),
    exactness={"paired": "resampled", "fast": "reshuffled"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces `aten::bernoulli_`, which every dropout on the CPU calls, by a "
        "counter-based generator (Philox4x32-7) that is compiled for this processor. Each "
        "call draws one key from the generator that it was given, so `torch.manual_seed`, "
        "generators and saved random states keep their meaning. The result does not "
        "depend on the number of threads. Dropout of at least 32,768 elements takes one "
        "pass over memory, forward and backward, and keeps one bit per element. The "
        "probability of keeping an element differs from the one asked for by at most 2^-17; "
        "elements that are kept are divided by the probability that is really used.\n\n"
        "Torch's own kernel draws one number per element. With `fast`, the state of the "
        "default generator therefore differs from the first dropout on, and with it the "
        "order of a shuffled loader. `paired` runs torch's kernel as well, so the state "
        "of the generator and the order of the data are the same as without the knob. It "
        "is no faster than torch and is used for proofs. The knob needs a C compiler.",
        helps="The knob helps programs with dropout on many elements: torch's generator on the "
        "CPU is serial, and takes up to a third of a step of a small GPT.",
        hurts="The knob must not be used for programs whose results must be bitwise identical "
        "to those of a run without it. In compiled regions the knob has no effect, "
        "because Inductor uses its own generator.",
        by_hand="Train without dropout (`p=0`), or compile the module with `torch.compile`, whose "
        "generator is fast as well.",
        sources=(
            "https://doi.org/10.1145/2063384.2063405 (Philox)",
            "https://docs.pytorch.org/docs/stable/library.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    proof_setting="paired",
    claims=("the CPU kernel of aten::bernoulli_", "dropout on the CPU"),
    kernels=("bernoulli",),
)
