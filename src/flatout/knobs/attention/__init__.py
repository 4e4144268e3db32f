"""Attention: on the CPU by a kernel of our own, on CUDA by the backend that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match
from flatout.knobs import fastpath
from flatout.knobs.attention.sizes import MOST_COLUMNS, MOST_TRAINED, MOST_WIDTH

if TYPE_CHECKING:
    from flatout.intercept.host import Host

NAME = "attention"

BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
}
"""Settings for CUDA, and the names of ``torch.nn.attention.SDPBackend``."""


FUSED = ("flash_attention_for_cpu",)
"""Torch's own kernel on the CPU, forward and backward; it takes attention without dropout."""


def match(facts: Facts) -> Match:
    """Needs attention in the step."""
    if facts.lack("scaled_dot_product", *(fastpath.OPERATORS if facts.device == "cpu" else ())):
        return Match((), "its steps do not call scaled_dot_product_attention")
    if facts.device == "cuda":
        return Match(tuple(BACKENDS), share=facts.share("attention"))
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    shares = [facts.unfused_attention_share, facts.share(*FUSED)]
    if not facts.lack(*fastpath.OPERATORS):
        shares.append(facts.share(*fastpath.ATTENTION))
    return Match(("fast",), share=None if None in shares else sum(filter(None, shares)))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator on the CPU, or prefer a backend in every outermost module call."""
    if setting in BACKENDS:
        from flatout.intercept import device

        if not device.has_cuda():
            raise RefusedError(f"{setting} is for CUDA, and there is no CUDA device")
        prefer = Preference(BACKENDS[setting])
        return host.forward_wrappers.append(prefer)

    from flatout.intercept import dispatch
    from flatout.knobs.attention import cpu

    library = dispatch.load_kernel("attention", "torch's own kernels")
    on_failure = host.applied.on_failure_of(NAME)
    with contextlib.ExitStack() as undo:
        switch_on = fastpath.switch_off(NAME, on_failure)
        if switch_on is not None:
            undo.callback(switch_on)
        undo.callback(cpu.install(library, is_paired=setting == "paired", on_failure=on_failure))
        return undo.pop_all().close


class Preference:
    """Tries one backend before the others; a mask or dtype it cannot take goes to the next.

    Args:
        name: of ``torch.nn.attention.SDPBackend``.
    """

    def __init__(self, name: str) -> None:
        from torch.nn.attention import SDPBackend

        first = getattr(SDPBackend, name)
        others = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
        self.order = [first, *(getattr(SDPBackend, other) for other in others if other != name)]

    def __call__(self, call: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        """Around an outermost module call."""
        from torch.nn.attention import sdpa_kernel

        engagement.calls[NAME] += 1
        with sdpa_kernel(self.order, set_priority=True):
            return call(module, *args, **kwargs)


KNOB = Knob(
    name=NAME,
    summary="attention on the CPU by a kernel that stores no matrix; on CUDA, the backend",
    settings=("paired", "fast", *BACKENDS),
    exactness={"paired": "resampled", "fast": "reshuffled", **dict.fromkeys(BACKENDS, "reordered")},
    proof_setting="paired",
    hot=True,
    platforms=("cpu", "cuda"),
    card=Card(
        what="On the CPU, `F.scaled_dot_product_attention` with dropout computes the whole matrix "
        "of probabilities in float32, draws a random number for each by a serial generator, and "
        "keeps both for the backward pass. `fast` goes through the matrix block by block, forward "
        "and backward, with scores and softmax in float32 and a counter-based generator "
        "(Philox4x32-7), and keeps one number a row. Where the processor has AVX-512, whole heads "
        "go through in one call, products and all, with a bit kept for each probability that may "
        "be dropped, and so does attention without dropout: heads "
        f"of at most {MOST_WIDTH} numbers a row, in training of at most {MOST_TRAINED} "
        f"rows and columns, in inference of at most {MOST_COLUMNS} columns. Columns at the "
        "end that a padding mask hides from all rows are left out. In inference, the fast path of "
        "transformer layers, which has an attention of its own, is switched off as by "
        "`fastpath=off`.\n\n"
        "Each call with dropout draws one key from torch's default "
        "generator, so seeds and saved random states keep their meaning; the masks, and what the "
        "program draws afterwards, are others. The probability of keeping is exact to 2^-17, and "
        "the rescaling fits it. `paired` leaves the generator as torch's own attention does, at no "
        "gain; it is there for proofs. Left to torch: grouped queries, masks that require "
        "gradients, compiled regions, `torch.func`, and attention without dropout where the "
        "program has switched the flash backend off. Needs a C compiler.\n\n"
        "On CUDA, `flash`, `cudnn` and `efficient` are tried before torch's other backends in "
        "every outermost module call.",
        helps="Transformers on the CPU, above all with dropout in their attention, a causal mask "
        "or padding (`python benchmarks/kernels.py attention`); on CUDA, "
        "shapes for which torch's order of backends is not the best.",
        hurts="Where results must be repeated number by number from a run without it.",
        by_hand="Train without dropout in the attention, which keeps torch on its flash path; on "
        "CUDA, `with torch.nn.attention.sdpa_kernel([...], set_priority=True): model(input)`.",
        sources=(
            "https://arxiv.org/abs/2205.14135 (FlashAttention)",
            "https://doi.org/10.1145/2063384.2063405 (Philox)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.attention.sdpa_kernel.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("scaled dot product attention",),
    kernels=("attention",),
)
