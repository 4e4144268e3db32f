"""Replace attention on the CPU: whole heads at once, or blocks of scores that stay in the cache.

``kernels/attention.c`` computes whole heads. For blocks of scores, torch computes the matmuls, and
the kernel everything between them.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo
from flatout.knobs.attention import blocks, heads
from flatout.knobs.attention.function import Attention, AttentionBackward
from flatout.knobs.attention.kernel import ALWAYS, Kernel, Options


def install(library: ctypes.CDLL, is_paired: bool, on_failure: OnFailure) -> Undo:
    """Replace attention on the CPU; returns the undo.

    Args:
        library: compiled from ``kernels/attention.c``.
        is_paired: whether torch's default generator advances as it does without the replacement.
        on_failure: called with the exception if the kernel fails; torch's kernel is then used.
    """
    kernel = Kernel(library)

    def attention(
        torch_kernel: Callable[..., Any],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> dispatch.DeferredCall | None:
        keep = round((1.0 - dropout_p) * ALWAYS)
        if (
            not 0 < keep <= ALWAYS
            or enable_gqa
            or (is_causal and attn_mask is not None)
            or not is_supported(query, key, value, attn_mask)
            or (keep == ALWAYS and not (dropout_p == 0.0 and _beats_flash(query, key, value)))
        ):
            return None

        state = torch.get_rng_state() if keep < ALWAYS else None
        random_key = 0 if state is None else draw_key()
        if state is not None and is_paired:
            torch.set_rng_state(state)
            query.new_empty((*query.shape[:3], key.shape[2])).bernoulli_(1.0 - dropout_p)

        def fall_back() -> torch.Tensor:
            if state is not None:
                torch.set_rng_state(state)
            output: torch.Tensor = torch_kernel(
                *(query, key, value, attn_mask, dropout_p, is_causal),
                scale=scale,
                enable_gqa=enable_gqa,
            )
            return output

        factor = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
        options = Options(factor, is_causal, keep, random_key, query.shape[1])
        return dispatch.DeferredCall(
            apply, (query, key, value, attn_mask, options, kernel, on_failure, fall_back)
        )

    return dispatch.override_operators(
        {"scaled_dot_product_attention": attention},
        "AutogradCPU",
        "CPU",
        on_failure=on_failure,
        may_rest=True,
    )


def draw_key() -> int:
    """Draw a key for the kernel's random numbers from torch's default generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def apply(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: Options,
    kernel: Kernel,
    on_failure: OnFailure,
    fall_back: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Compute attention of 4-dimensional tensors, as ``F.scaled_dot_product_attention`` does.

    Args:
        query: batch x heads x rows x width.
        key: batch x heads x columns x width.
        value: batch x heads x columns x another width.
        mask: broadcasts to batch x heads x rows x columns; true where a row sees a column, or
            numbers to be added to the scores.
        options: the other arguments.
        kernel: the compiled kernel.
        on_failure: called with the exception if the kernel fails.
        fall_back: called if the kernel fails; its result is returned.
    """
    batch, count, rows, _ = query.shape
    bias = None if mask is None else to_bias(mask)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if trains and options.keep < ALWAYS:
        query, key, value, bias = _copy_as_torch_does(query, key, value, bias, mask)
    if bias is not None:
        bias = bias.expand(batch, count, rows, key.shape[2])
    if heads.is_supported(query, key, value):
        inputs = tuple(map(heads.make_rows_contiguous, (query, key, value)))
        implementation = heads.IMPLEMENTATION
    else:
        inputs = tuple(
            x.reshape(batch * count, *x.shape[2:]).contiguous() for x in (query, key, value)
        )
        implementation = blocks.IMPLEMENTATION
    outputs = dispatch.attempt_below_autograd(
        on_failure, implementation.outputs, *inputs, bias, options, kernel
    )
    if outputs is None:
        return fall_back()
    output, *rest = outputs
    backward = AttentionBackward(options, kernel, implementation, on_failure)
    saved = (*inputs, bias, output, *rest)
    if trains and options.keep < ALWAYS:
        # Torch's attention with dropout does not save its output, so the program may write to it.
        output = output.clone()
    if implementation is blocks.IMPLEMENTATION:
        shape = batch, count, rows, value.shape[3]
        output = torch.ops.aten._unsafe_view.default(output, shape)  # autograd sees no view
    return dispatch.record_in_graph(Attention, backward, output, saved, *inputs)


def _copy_as_torch_does(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Copy the tensors that the program may modify after the call without an error from autograd.

    Torch's attention with dropout saves scaled copies of queries and keys, the values as one batch
    in float32, and not the mask.
    """

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    batch, heads = value.stride()[:2]
    is_one_batch = 1 in value.shape[:2] or batch == value.shape[1] * heads
    if not is_one_batch or value.dtype is not torch.float32:
        value = copy(value)
    if bias is not None and mask is not None and bias.data_ptr() == mask.data_ptr():
        bias = bias.clone()
    return copy(query), copy(key), value, bias


def to_bias(mask: torch.Tensor) -> torch.Tensor:
    """Convert a mask to what it adds to the scores, in float32; expanded dimensions get size 1."""
    for dimension, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dimension, 0, 1)
    if mask.dtype is not torch.bool:
        return mask.float()
    zeros = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
    return zeros.masked_fill_(~mask, -math.inf)


def is_supported(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Whether these are plain tensors of supported dtypes and matching shapes, and nothing (such as
    ``torch.func`` or tracing) transforms the call."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not dispatch.may_use_kernel(*tensors):
        return False
    batch_and_heads, columns = query.shape[:2], key.shape[2:3]
    return (
        query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.dim() == key.dim() == value.dim() == 4
        and key.shape == (*batch_and_heads, *columns, query.shape[3])
        and value.shape[:3] == key.shape[:3]
        and min(query.numel(), key.numel(), value.numel()) > 0
        and (
            mask is None
            or (
                mask.dtype in _MASK_DTYPES
                and not mask.requires_grad
                and mask.dim() <= 4
                and _broadcasts(mask.shape, (*query.shape[:3], key.shape[2]))
            )
        )
    )


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return all(size in (1, wanted) for size, wanted in zip(shape[::-1], to[::-1], strict=False))


def _beats_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether to compute attention without dropout, for which torch has its flash kernel.

    It is left to torch where the program has switched that kernel off
    (``torch.nn.attention.sdpa_kernel``).
    """
    return torch.backends.cuda.flash_sdp_enabled() and heads.is_supported(query, key, value)


_MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16)
