"""Draw the random numbers of dropout and ``aten::bernoulli_`` with a parallel generator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatout import machine
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "random"


def match(facts: Facts) -> Match:
    """Offer the faster settings where a step draws Bernoulli numbers."""
    if facts.lack("bernoulli"):
        return Match((), "no step draws Bernoulli random numbers")
    # Torch draws by MKL on processors of Intel (bernoulli_mkl_kernel in
    # ATen/native/cpu/DistributionTemplates.h), and ``same`` is refused there.
    draws_by_mkl = machine.cpu_vendor() == "GenuineIntel"
    settings = ("fast",) if draws_by_mkl else ("same", "fast")
    return Match(settings, share=facts.share("bernoulli"))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operators, for every thread of this process.

    Raises:
        RefusedError: the kernel cannot be built, this torch is too old to replace operators, or
            ``same`` would draw other numbers than torch.
    """
    from flatout.intercept import dispatch
    from flatout.knobs.random import cpu

    if setting == "same":
        return cpu.install_same(host.applied.on_failure_of(NAME))
    return cpu.install(
        dispatch.load_kernel("bernoulli", "torch's own numbers"),
        paired=setting == "paired",
        on_failure=host.applied.on_failure_of(NAME),
    )


KNOB = Knob(
    name=NAME,
    summary="draw many of dropout's random numbers at once; `fast` draws others than torch does",
    settings=("paired", "same", "fast"),
    exactness={"paired": "resampled", "same": "bitwise", "fast": "reshuffled"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces `aten::bernoulli_`, which every dropout on the CPU calls. Torch "
        "draws one number after the other. `same` draws the same numbers, bit for bit, about ten "
        "times as fast: its kernel advances torch's generator, a Mersenne Twister, by whole "
        "tables.\n\n"
        "`fast` uses a counter-based generator (Philox4x32-7) that is compiled for this "
        "processor. Each call draws one key from the generator that it was given, so "
        "`torch.manual_seed`, generators and saved random states keep their meaning. The result "
        "does not depend on the number of threads. Dropout of at least 32,768 elements takes one "
        "pass over memory, forward and backward, and keeps one bit per element. The "
        "probability of keeping an element differs from the one asked for by at most 2^-17; "
        "elements that are kept are divided by the probability that is really used. The state of "
        "the default generator differs from the first dropout on, and with it the order of a "
        "shuffled loader. `paired` runs torch's kernel as well, so the state of the generator and "
        "the order of the data are the same as without the knob. It is no faster than torch and "
        "is used for proofs of `fast`. The knob needs a C compiler.",
        helps="The knob helps programs with dropout on many elements: torch's generator on the "
        "CPU is serial, and takes up to a half of a step of a small GPT.",
        hurts="`fast` must not be used for programs whose results must be bitwise identical to "
        "those of a run without it. `same` is refused on processors of Intel on which torch draws "
        "by MKL. In compiled regions the knob has no effect, because Inductor uses its own "
        "generator.",
        by_hand="Train without dropout (`p=0`), or compile the module with `torch.compile`, whose "
        "generator is fast as well.",
        sources=(
            "https://doi.org/10.1145/2063384.2063405 (Philox)",
            "https://doi.org/10.1145/272991.272995 (Mersenne Twister)",
            "https://docs.pytorch.org/docs/stable/library.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    proof_setting="paired",
    claims=("the CPU kernel of aten::bernoulli_", "dropout on the CPU"),
    kernels=("bernoulli", "twister"),
    replaces=("bernoulli",),
)
