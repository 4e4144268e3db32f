"""Attention on the CPU: whole heads, or blocks of scores that stay in the cache.

Of blocks the matrix products are torch's; what lies between them, and whole heads, are done by
``kernels/attention.c``.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any

import torch

from flatout.agent import dispatch
from flatout.knobs import Undo
from flatout.knobs.attention import heads
from flatout.knobs.attention.kernel import ALWAYS, FailedError, Job, Kernel, backward

OPERATOR = "aten::scaled_dot_product_attention"


class Scratch:
    """Memory that is used for one tensor after the other, so that its pages stay."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype, device="cpu")

    def of(self, *shape: int) -> torch.Tensor:
        """A contiguous tensor with whatever was there before."""
        count = math.prod(shape)
        if self._memory.numel() < count:
            self._memory = self._memory.new_empty(count)
        return self._memory[:count].view(shape)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy; the tensor itself where that is contiguous and of this dtype."""
        if tensor.dtype is self._memory.dtype and tensor.is_contiguous():
            return tensor
        return self.of(*tensor.shape).copy_(tensor)


class Attention(torch.autograd.Function):
    """Softmax of scaled products, dropout, and the product with the values, block by block.

    Saved for the backward pass: what came in, what went out, and one number a row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        job: Job,
        kernel: Kernel,
        on_failure: Callable[[Exception], None],
    ) -> torch.Tensor:
        """Args: heads x rows x width, heads x columns x width (twice), ``Job.blocks``' bias."""
        try:
            output, sums = _outputs(query, key, value, bias, job, kernel)
        except Exception as error:
            on_failure(error)
            raise FailedError from error
        ctx.save_for_backward(query, key, value, bias, output, sums)
        ctx.job, ctx.kernel, ctx.on_failure = job, kernel, on_failure
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See ``forward``; what it returns can be differentiated when that is asked for."""
        return backward(ctx, gradient, _gradients)


def _outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    job: Job,
    kernel: Kernel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes out, and the logarithm of the sum of each row."""
    heads, rows, _ = query.shape
    columns = key.shape[1]
    output = query.new_empty(heads, rows, value.shape[2])
    sums = torch.empty(heads, rows, dtype=torch.float32, device="cpu")
    exact_queries, exact_keys, all_scores, all_sums = (Scratch(torch.float32) for _ in range(4))
    all_dropped, all_outputs = Scratch(query.dtype), Scratch(query.dtype)
    for group in job.groups(heads, rows, columns):
        exact_query = exact_queries.copy_of(query[group])
        exact_key = exact_keys.copy_of(key[group])
        for block, seen_by, seen in job.blocks(group, query, key, bias):
            shape = block.heads, block.rows, block.columns
            scores, dropped = all_scores.of(*shape), all_dropped.of(*shape)
            of_rows = all_sums.of(*shape[:2])
            torch.bmm(exact_query[:, seen_by], exact_key[:, seen].mT, out=scores)
            kernel.forward(
                ctypes.addressof(block),
                *(tensor.data_ptr() for tensor in (scores, dropped, of_rows)),
            )
            sums[group, seen_by] = of_rows
            summed = all_outputs.of(*shape[:2], value.shape[2])
            output[group, seen_by] = torch.bmm(dropped, value[group, seen], out=summed)
    return output, sums


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    gradient: torch.Tensor,
    job: Job,
    kernel: Kernel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradient = gradient.contiguous()
    means = torch.empty_like(sums)
    kernel.row_products(
        output.data_ptr(),
        gradient.data_ptr(),
        means.data_ptr(),
        means.numel(),
        output.shape[2],
        output.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    heads, rows, _ = query.shape
    columns = key.shape[1]
    of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
    exact_queries, exact_keys, all_scores, all_sums, all_means, keys_summed, values_summed = (
        Scratch(torch.float32) for _ in range(7)
    )
    exact_gradients, exact_values, all_of_dropped = (Scratch(torch.float32) for _ in range(3))
    all_dropped, all_of_scores, products = (Scratch(query.dtype) for _ in range(3))
    for group in job.groups(heads, rows, columns):
        exact_query = exact_queries.copy_of(query[group])
        exact_key = exact_keys.copy_of(key[group])
        exact_gradient = exact_gradients.copy_of(gradient[group])
        exact_value = exact_values.copy_of(value[group])
        key_sum = keys_summed.of(*key[group].shape).zero_()
        value_sum = values_summed.of(*value[group].shape).zero_()
        for block, seen_by, seen in job.blocks(group, query, key, bias):
            shape = block.heads, block.rows, block.columns
            scores, of_dropped, dropped, of_scores = (
                memory.of(*shape)
                for memory in (all_scores, all_of_dropped, all_dropped, all_of_scores)
            )
            here = gradient[group, seen_by]
            torch.bmm(exact_query[:, seen_by], exact_key[:, seen].mT, out=scores)
            torch.bmm(exact_gradient[:, seen_by], exact_value[:, seen].mT, out=of_dropped)
            kernel.backward(
                ctypes.addressof(block),
                scores.data_ptr(),
                all_sums.copy_of(sums[group, seen_by]).data_ptr(),
                all_means.copy_of(means[group, seen_by]).data_ptr(),
                *(tensor.data_ptr() for tensor in (of_dropped, dropped, of_scores)),
            )

            def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
                to = products.of(left.shape[0], left.shape[1], right.shape[2])
                return torch.bmm(left, right, out=to)

            of_query[group, seen_by] = product(of_scores, key[group, seen])
            key_sum[:, seen] += product(of_scores.mT, query[group, seen_by])
            value_sum[:, seen] += product(dropped.mT, here)
        of_key[group], of_value[group] = key_sum, value_sum
    return of_query, of_key, of_value


def install(library: ctypes.CDLL, is_paired: bool, on_failure: Callable[[Exception], None]) -> Undo:
    """Replace attention on the CPU; returns what puts torch's own back.

    Args:
        library: of ``kernels/attention.c``.
        is_paired: the default generator advances as it would without this.
        on_failure: called when it could not be computed; torch's own way has been gone then.
    """
    own = torch.library.get_kernel(OPERATOR, "AutogradCPU")
    kernel = Kernel(library)

    def attention(
        keyset: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        keep = round((1.0 - dropout_p) * ALWAYS)
        if (
            0 < keep <= ALWAYS
            and not enable_gqa
            and not (is_causal and attn_mask is not None)
            and can_take(query, key, value, attn_mask)
            and (keep < ALWAYS or (dropout_p == 0.0 and heads.can_take(query, key, value)))
        ):
            state = torch.get_rng_state() if keep < ALWAYS else None
            try:
                drawn = 0 if state is None else draw()
                if state is not None and is_paired:
                    torch.set_rng_state(state)
                    query.new_empty((*query.shape[:3], key.shape[2])).bernoulli_(1.0 - dropout_p)
                width = query.shape[3]
                job = Job(
                    1.0 / math.sqrt(width) if scale is None else scale,
                    *(is_causal, keep, drawn, query.shape[1]),
                )
                return apply(query, key, value, attn_mask, job, kernel, on_failure)
            except FailedError:
                if state is not None:
                    torch.set_rng_state(state)
        result: torch.Tensor = own.call_boxed(
            *(keyset, query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return result

    return dispatch.replace({"scaled_dot_product_attention": attention}, "AutogradCPU", "CPU")


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
    on_failure: Callable[[Exception], None],
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
        on_failure: called when the backward pass failed and was gone in operations of torch.
    """
    batch, count, rows, _ = query.shape
    bias = None if mask is None else added(mask).expand(batch, count, rows, key.shape[2])
    if heads.can_take(query, key, value):
        rows_in_one_piece = map(heads.with_rows, (query, key, value))
        whole: torch.Tensor = heads.WholeHeads.apply(
            *rows_in_one_piece, bias, job, kernel, on_failure
        )
        return whole
    flat = (x.reshape(batch * count, *x.shape[2:]).contiguous() for x in (query, key, value))
    output: torch.Tensor = Attention.apply(*flat, bias, job, kernel, on_failure)
    return output.view(batch, count, rows, value.shape[3])


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
        and (mask is None or (mask.dtype in _MASKS and not mask.requires_grad and mask.dim() <= 4))
    )


_MASKS = (torch.bool, torch.float32, torch.bfloat16)
