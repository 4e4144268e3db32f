"""Attention on the CPU: whole heads, or blocks of scores that stay in the cache.

Of blocks the matrix products are torch's; what lies between them, and whole heads, are done by
``kernels/attention.c``.
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
from flatout.knobs.attention.function import Attending, Attention
from flatout.knobs.attention.kernel import ALWAYS, Job, Kernel


def install(library: ctypes.CDLL, is_paired: bool, on_failure: OnFailure) -> Undo:
    """Replace attention on the CPU; returns what puts torch's own back.

    Args:
        library: of ``kernels/attention.c``.
        is_paired: the default generator advances as it would without this.
        on_failure: told when it could not be computed; torch's own way has been gone then.
    """
    kernel = Kernel(library)

    def attention(
        below: Callable[..., Any],
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
            or not can_take(query, key, value, attn_mask)
            or (keep == ALWAYS and not (dropout_p == 0.0 and _instead_of_flash(query, key, value)))
        ):
            return None

        state = torch.get_rng_state() if keep < ALWAYS else None
        drawn = 0 if state is None else draw()
        if state is not None and is_paired:
            torch.set_rng_state(state)
            query.new_empty((*query.shape[:3], key.shape[2])).bernoulli_(1.0 - dropout_p)

        def torchs_own() -> torch.Tensor:
            if state is not None:
                torch.set_rng_state(state)
            made: torch.Tensor = below(
                *(query, key, value, attn_mask, dropout_p, is_causal),
                scale=scale,
                enable_gqa=enable_gqa,
            )
            return made

        scaled = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
        job = Job(scaled, is_causal, keep, drawn, query.shape[1])
        return dispatch.DeferredCall(
            apply, (query, key, value, attn_mask, job, kernel, on_failure, torchs_own)
        )

    return dispatch.override_operators(
        {"scaled_dot_product_attention": attention}, "AutogradCPU", "CPU", on_failure=on_failure
    )


def draw() -> int:
    """A key of random numbers, from torch's generator."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().item())


def apply(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    job: Job,
    kernel: Kernel,
    on_failure: OnFailure,
    otherwise: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Attention of tensors with the shapes of ``F.scaled_dot_product_attention``, of 4 dimensions.

    Args:
        query: batch x heads x rows x width.
        key: batch x heads x columns x width.
        value: batch x heads x columns x another width.
        mask: what broadcasts to batch x heads x rows x columns: true where a row sees a column, or
            numbers to be added to the scores.
        job: what is asked for.
        kernel: the compiled part.
        on_failure: told of a failure.
        otherwise: what is done then.
    """
    batch, count, rows, _ = query.shape
    bias = None if mask is None else added(mask)
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if trains and job.keep < ALWAYS:
        query, key, value, bias = _may_be_written(query, key, value, bias, mask)
    if bias is not None:
        bias = bias.expand(batch, count, rows, key.shape[2])
    if heads.can_take(query, key, value):
        inputs = tuple(map(heads.with_rows, (query, key, value)))
        how = heads.WAY
    else:
        inputs = tuple(
            x.reshape(batch * count, *x.shape[2:]).contiguous() for x in (query, key, value)
        )
        how = blocks.WAY
    made = dispatch.attempt_below_autograd(on_failure, how.outputs, *inputs, bias, job, kernel)
    if made is None:
        return otherwise()
    output, *kept = made
    way = Attending(job, kernel, how, on_failure)
    saved = (*inputs, bias, output, *kept)
    if trains and job.keep < ALWAYS:
        output = output.clone()  # torch's saves none, so the program may write to it
    if how is blocks.WAY:
        shape = batch, count, rows, value.shape[3]
        output = torch.ops.aten._unsafe_view.default(output, shape)  # no view to autograd
    return dispatch.record_in_graph(Attention, way, output, saved, *inputs)


def _may_be_written(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensors in memory that the program does not write to, as torch's attention with dropout
    saves them: scaled queries and keys, values as one batch in float32, nothing of the mask."""

    def copy(x: torch.Tensor) -> torch.Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    batch, heads = value.stride()[:2]
    is_one_batch = 1 in value.shape[:2] or batch == value.shape[1] * heads
    if not is_one_batch or value.dtype is not torch.float32:
        value = copy(value)
    if bias is not None and mask is not None and bias.data_ptr() == mask.data_ptr():
        bias = bias.clone()
    return copy(query), copy(key), value, bias


def added(mask: torch.Tensor) -> torch.Tensor:
    """What a mask adds to the scores, with dimensions of 1 where the mask was expanded."""
    for dimension, stride in enumerate(mask.stride()):
        if stride == 0:
            mask = mask.narrow(dimension, 0, 1)
    if mask.dtype is not torch.bool:
        return mask.float()
    nothing = torch.zeros(mask.shape, dtype=torch.float32, device="cpu")
    return nothing.masked_fill_(~mask, -math.inf)


def can_take(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Whether these are plain tensors with shapes that fit, outside of anything that transforms."""
    tensors = (query, key, value) if mask is None else (query, key, value, mask)
    if not dispatch.are_plain(*tensors):
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
                mask.dtype in _MASKS
                and not mask.requires_grad
                and mask.dim() <= 4
                and _broadcasts(mask.shape, (*query.shape[:3], key.shape[2]))
            )
        )
    )


def _broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    return all(size in (1, wanted) for size, wanted in zip(shape[::-1], to[::-1], strict=False))


def _instead_of_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether attention without dropout can be taken, which the program may have another wish for
    (``torch.nn.attention.sdpa_kernel``)."""
    return torch.backends.cuda.flash_sdp_enabled() and heads.can_take(query, key, value)


_MASKS = (torch.bool, torch.float32, torch.bfloat16)
