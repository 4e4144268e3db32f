"""Attention on the CPU in blocks of scores that stay in the cache, with dropout in the same pass.

The matrix products are torch's; what lies between them is ``kernels/attention.c``.
"""

from __future__ import annotations

import ctypes
import math

import torch

from flatout.knobs.attention.function import Way
from flatout.knobs.attention.kernel import Job, Kernel


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


WAY = Way(_outputs, _gradients)
"""Of heads x rows x width, heads x columns x width (twice)."""
