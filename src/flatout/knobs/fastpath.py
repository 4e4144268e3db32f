"""The fast path of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention`` in inference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.containment import OnFailure
    from flatout.intercept.host import Host

NAME = "fastpath"

OPERATORS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
ATTENTION = ("_masked_softmax", "::_softmax", "::bmm", *OPERATORS)
"""Operators of the attention that the fast path computes in its own way."""


def match(facts: Facts) -> Match:
    """Needs the fast path in its steps."""
    if facts.lack(*OPERATORS):
        return Match((), "its steps do not take the fast path of torch's transformer layers")
    return Match(("off",), share=facts.share(*ATTENTION))


def apply(host: Host, setting: str) -> Undo:
    """Switch it off for the process, unless the program has done so."""
    undo = switch_off(NAME, host.applied.on_failure_of(NAME))
    if undo is None:
        raise RefusedError("the program has switched the fast path off itself")
    return undo


_wishes: list[str] = []
"""The knobs that want it to be off."""

_forwards = contextlib.ExitStack()


def switch_off(knob: str, on_failure: OnFailure) -> Undo | None:
    """Switch it off until the last wish is taken back; ``None``: the program has done so.

    Args:
        knob: that wants it.
        on_failure: told when that has failed in a pass.
    """
    import torch
    from torch import nn

    from flatout.intercept.patch import wrap_function

    if not _wishes:
        if not torch.backends.mha.get_fastpath_enabled():
            return None
        for kind in (nn.TransformerEncoderLayer, nn.MultiheadAttention):
            _forwards.callback(wrap_function(kind, "forward", on_failure, _without))
    _wishes.append(knob)

    def undo() -> None:
        _wishes.remove(knob)
        if not _wishes:
            _forwards.close()

    return undo


def _without(forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    """A module's pass forward without the fast path.

    ``nn.TransformerEncoder`` makes nested tensors of padded batches where the fast path is on, and
    zeros of the padding. That is left to it, and so are the layers that then get nested tensors,
    which only the fast path can take.
    """
    import torch

    from flatout.intercept.capture import is_traced

    if (
        is_traced()
        or not torch.backends.mha.get_fastpath_enabled()
        or any(isinstance(x, torch.Tensor) and x.is_nested for x in (*args, *kwargs.values()))
    ):
        return forward(module, *args, **kwargs)
    engagement.calls.update(_wishes)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return forward(module, *args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


KNOB = Knob(
    name=NAME,
    summary="transformer layers in inference by scaled_dot_product_attention, not their fast path",
    settings=("off",),
    exactness={"off": "reordered"},
    hot=True,
    platforms=("cpu", "cuda"),
    card=Card(
        what="In inference, torch's `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` take "
        "a fast path of their own, `_transformer_encoder_layer_fwd`. With a padding mask, it "
        "computes the softmax on the CPU by a kernel that is not vectorised, and autocast does "
        "not reach its products. `off` switches it off within these modules "
        "(`torch.backends.mha.set_fastpath_enabled(False)`): attention goes through "
        "`F.scaled_dot_product_attention`, and lower precision works. Where "
        "`nn.TransformerEncoder` makes nested tensors of a padded batch (`enable_nested_tensor`), "
        "nothing changes: only the fast path takes these.",
        helps="Inference with `nn.TransformerEncoder` and a padding mask on the CPU: `python "
        "benchmarks/kernels.py fastpath` gave 1.17 (1.13 to 1.20, 12 pairs) in float32 on a Zen 5. "
        "With lower precision, which the fast path keeps out, it brings more.",
        hurts="Where its fused kernels on CUDA are faster.",
        by_hand="`torch.backends.mha.set_fastpath_enabled(False)`",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html",
            "https://docs.pytorch.org/docs/stable/backends.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the fast path of transformer layers",),
)
