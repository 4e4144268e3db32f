"""Switch off the inference fast path of ``nn.TransformerEncoder`` and ``nn.MultiheadAttention``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    from flatout.intercept.containment import OnFailure
    from flatout.intercept.host import Host

NAME = "fastpath"

OPERATORS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")
ATTENTION = ("_masked_softmax", "::_softmax", "::bmm", *OPERATORS)
"""Operators of which the fast path's attention consists."""


def match(facts: Facts) -> Match:
    """Offer the setting where a step uses the fast path."""
    if facts.lack(*OPERATORS):
        return Match((), "no step uses the fast path of torch's transformer layers")
    return Match(("off",), share=facts.share(*ATTENTION))


def apply(host: Host, setting: str) -> Undo:
    """Switch the fast path off in this process.

    Raises:
        RefusedError: the program has switched it off already.
    """
    undo = switch_off(NAME, host.applied.on_failure_of(NAME))
    if undo is None:
        raise RefusedError("the program has switched the fast path off itself")
    return undo


_users: list[str] = []
"""Names of the knobs for which the fast path is off."""

_replaced_forwards = contextlib.ExitStack()
"""Puts back the ``forward`` methods of torch's classes."""


def switch_off(knob: str, on_failure: OnFailure) -> Undo | None:
    """Switch the fast path off until each knob that has called this has undone it.

    Args:
        knob: name of the knob that needs it to be off.
        on_failure: called with the exception if the replacement of a ``forward`` method fails.

    Returns:
        The undo, or ``None`` if the program has switched the fast path off already.
    """
    import torch
    from torch import nn

    from flatout.intercept.patch import wrap_function

    if not _users:
        if not torch.backends.mha.get_fastpath_enabled():
            return None
        for kind in (nn.TransformerEncoderLayer, nn.MultiheadAttention):
            undo_forward = wrap_function(kind, "forward", on_failure, _forward_without_fastpath)
            _replaced_forwards.callback(undo_forward)
    _users.append(knob)

    def undo() -> None:
        _users.remove(knob)
        if not _users:
            _replaced_forwards.close()

    return undo


def _forward_without_fastpath(
    forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any
) -> Any:
    """Run a module's forward pass without the fast path.

    Where the fast path is on, ``nn.TransformerEncoder`` turns padded batches into nested tensors,
    and padding into zeros. It and the layers that it then calls with nested tensors keep the fast
    path, because only the fast path supports nested tensors.
    """
    import torch

    from flatout.intercept.capture import is_traced

    if (
        is_traced()
        or not torch.backends.mha.get_fastpath_enabled()
        or any(isinstance(x, torch.Tensor) and x.is_nested for x in (*args, *kwargs.values()))
    ):
        return forward(module, *args, **kwargs)
    handled_calls.counts.update(_users)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return forward(module, *args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


KNOB = Knob(
    name=NAME,
    summary="run transformer layers in inference without torch's fast path",
    settings=("off",),
    exactness={"off": "reordered"},
    hot=True,
    platforms=("cpu", "cuda"),
    card=Card(
        what="The knob switches off the inference fast path of `nn.TransformerEncoderLayer` "
        "and `nn.MultiheadAttention` while these modules run "
        "(`torch.backends.mha.set_fastpath_enabled(False)`), so attention goes through "
        "`F.scaled_dot_product_attention`. With a padding mask on the CPU, the fast path "
        "(`_transformer_encoder_layer_fwd`) computes the softmax in a kernel that is not "
        "vectorised, and autocast does not apply to its matmuls. If "
        "`nn.TransformerEncoder` turns a padded batch into nested tensors "
        "(`enable_nested_tensor`), the knob changes nothing, because only the fast path "
        "supports them.",
        helps="The knob helps inference with `nn.TransformerEncoder` and a padding mask on the "
        "CPU: `python benchmarks/kernels.py fastpath` measured a speedup of 1.17 (1.13 to "
        "1.20, 12 pairs) in float32 on a Zen 5. The gain is larger together with lower "
        "precision, which the fast path prevents.",
        hurts="On CUDA, some programs are faster with the fused kernels of the fast path.",
        by_hand="Call `torch.backends.mha.set_fastpath_enabled(False)`.",
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
