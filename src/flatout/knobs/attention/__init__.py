"""Run attention in flatout's own kernel on the CPU, and in a chosen backend on CUDA."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import handled_calls
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
"""The settings for CUDA, with the names of ``torch.nn.attention.SDPBackend``."""

FUSED = ("flash_attention_for_cpu",)
"""Torch's own fused kernel on the CPU, forward and backward; it supports no dropout."""


def match(facts: Facts) -> Match:
    """Offer the settings for the device where a step computes attention."""
    if facts.lack("scaled_dot_product", *(fastpath.OPERATORS if facts.device == "cpu" else ())):
        return Match((), "no step calls scaled_dot_product_attention")
    if facts.device == "cuda":
        return Match(tuple(BACKENDS), share=facts.share("attention"))
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    shares = [facts.unfused_attention_share, facts.share(*FUSED)]
    if not facts.lack(*fastpath.OPERATORS):
        shares.append(facts.share(*fastpath.ATTENTION))
    return Match(("fast",), share=None if None in shares else sum(filter(None, shares)))


def apply(host: Host, setting: str) -> Undo:
    """Replace the operator on the CPU, or prefer a backend in every outermost module call.

    Raises:
        RefusedError: there is no CUDA device, or the kernel cannot be built.
    """
    if setting in BACKENDS:
        from flatout.intercept import device

        if not device.has_cuda():
            raise RefusedError(f"{setting} needs CUDA, and there is no CUDA device")
        return host.forward_wrappers.append(Preference(BACKENDS[setting]))

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
    """A forward wrapper that makes torch try one backend before the others.

    Attention that this backend does not support is computed by the next one in ``order``.

    Args:
        name: a member of ``torch.nn.attention.SDPBackend``.

    Attributes:
        order: all backends, in the order in which torch tries them.
    """

    def __init__(self, name: str) -> None:
        from torch.nn.attention import SDPBackend

        first = getattr(SDPBackend, name)
        others = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
        self.order = [first, *(getattr(SDPBackend, other) for other in others if other != name)]

    def __call__(self, call: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        """Run an outermost module call with this order of backends."""
        from torch.nn.attention import sdpa_kernel

        handled_calls.counts[NAME] += 1
        with sdpa_kernel(self.order, set_priority=True):
            return call(module, *args, **kwargs)


KNOB = Knob(
    name=NAME,
    summary="on the CPU, use an attention kernel that stores no score matrix; on CUDA, choose the "
    "attention backend",
    settings=("paired", "fast", *BACKENDS),
    exactness={"paired": "resampled", "fast": "reshuffled", **dict.fromkeys(BACKENDS, "reordered")},
    hot=True,
    platforms=("cpu", "cuda"),
    card=Card(
        what="On the CPU, `fast` replaces `F.scaled_dot_product_attention` by a kernel that is "
        "compiled for this processor. With dropout, torch computes the whole matrix of "
        "probabilities in float32, draws a random number for each of them with a serial "
        "generator, and keeps both for the backward pass. `fast` processes the matrix "
        "block by block, forward and backward. It computes scores and softmax in float32, "
        "draws random numbers with a counter-based generator (Philox4x32-7), which can draw them "
        "again in the backward pass. For that pass it keeps only the logarithm of the softmax "
        "denominator of each row. `paired` is for proofs only: it computes what `fast` computes, "
        "but also advances torch's generator as torch's attention would. The data keep "
        "their order, and no time is saved.\n\n"
        "On processors with AVX-512, another kernel takes shorter sequences. One call of it "
        "computes whole heads, including their matmuls, and keeps one bit for each "
        "probability that may be dropped. This kernel is also used if there is no dropout. "
        f"The head dimension may be at most {MOST_WIDTH}, the sequence "
        f"length in training at most {MOST_TRAINED}, "
        f"and the number of keys in inference at most {MOST_COLUMNS}. Beyond these sizes, "
        "attention with dropout is processed block by block, and attention without "
        "dropout is left to torch. Keys at the end of a sequence are skipped if a padding "
        "mask hides them from all queries. In inference, the fast path of transformer "
        "layers is switched off, as by `fastpath=off`.\n\n"
        "Each call with dropout draws one Philox key (seed) from torch's default "
        "generator, so seeds and saved random states keep their meaning. The dropout "
        "masks differ from torch's, and so do the numbers that the program draws "
        "afterwards. The probability of keeping an element differs from the one asked for by "
        "at most 2^-17; elements that are kept are divided by the probability that is used.\n\n"
        "The knob calls torch's own attention for grouped queries, dtypes other than "
        "float32 and bfloat16, masks that require gradients, compiled regions and "
        "`torch.func`. Without dropout, it also does so if the processor has no "
        "AVX-512, or if the program has switched the flash backend off. The settings for "
        "the CPU need a C compiler.\n\n"
        "On CUDA, `flash`, `cudnn` and `efficient` make torch try the backend of that "
        "name before the others.",
        helps="On the CPU, the knob helps transformers, especially with dropout in the "
        "attention, a causal mask or padding (`python benchmarks/kernels.py attention` "
        "measures the gain). On CUDA, it helps with shapes for which torch's order of "
        "backends is not the best.",
        hurts="The knob must not be used for programs whose results must be bitwise identical "
        "to those of a run without it.",
        by_hand="Train without dropout in the attention, so that torch uses its flash kernel; on "
        "CUDA, use `with torch.nn.attention.sdpa_kernel([...], set_priority=True): "
        "model(input)`.",
        sources=(
            "https://arxiv.org/abs/2205.14135 (FlashAttention)",
            "https://doi.org/10.1145/2063384.2063405 (Philox)",
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.attention.sdpa_kernel.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    proof_setting="paired",
    claims=("scaled dot product attention",),
    kernels=("attention",),
    replaces=("scaled_dot_product", *fastpath.OPERATORS),
)
