"""Compute attention on the CPU in blocks of scores that stay in the cache.

Torch computes the matmuls, and ``kernels/attention.c`` everything between them, including dropout.
"""

from __future__ import annotations

import ctypes
import math

import torch

from flatout.knobs.attention.function import Implementation
from flatout.knobs.attention.kernel import Kernel, Options


class Scratch:
    """Memory that is reused for one tensor after the other, which saves page faults."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._memory = torch.empty(0, dtype=dtype, device="cpu")

    def of(self, *shape: int) -> torch.Tensor:
        """A contiguous, uninitialised tensor of this shape."""
        count = math.prod(shape)
        if self._memory.numel() < count:
            self._memory = self._memory.new_empty(count)
        return self._memory[:count].view(shape)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A contiguous copy; the tensor itself if it is contiguous and has this dtype."""
        if tensor.dtype is self._memory.dtype and tensor.is_contiguous():
            return tensor
        return self.of(*tensor.shape).copy_(tensor)


def _outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    options: Options,
    kernel: Kernel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the logarithm of the sum of each row of exponentials."""
    heads, rows, _ = query.shape
    columns = key.shape[1]
    output = query.new_empty(heads, rows, value.shape[2])
    sums = torch.empty(heads, rows, dtype=torch.float32, device="cpu")
    query_memory, key_memory, scores_memory, sums_memory = (
        Scratch(torch.float32) for _ in range(4)
    )
    dropped_memory, output_memory = Scratch(query.dtype), Scratch(query.dtype)
    for group in options.groups(heads, rows, columns):
        group_query = query_memory.copy_of(query[group])
        group_key = key_memory.copy_of(key[group])
        for block, block_rows, block_columns in options.blocks(group, query, key, bias):
            shape = block.heads, block.rows, block.columns
            scores, dropped = scores_memory.of(*shape), dropped_memory.of(*shape)
            block_sums = sums_memory.of(*shape[:2])
            torch.bmm(group_query[:, block_rows], group_key[:, block_columns].mT, out=scores)
            kernel.forward(
                ctypes.addressof(block),
                *(tensor.data_ptr() for tensor in (scores, dropped, block_sums)),
            )
            sums[group, block_rows] = block_sums
            block_output = output_memory.of(*shape[:2], value.shape[2])
            torch.bmm(dropped, value[group, block_columns], out=block_output)
            output[group, block_rows] = block_output
    return output, sums


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    gradient: torch.Tensor,
    options: Options,
    kernel: Kernel,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key and value."""
    gradient = gradient.contiguous()
    row_products = _row_products(output, gradient, kernel)
    heads, rows, _ = query.shape
    columns = key.shape[1]
    query_gradient, key_gradient, value_gradient = (
        torch.empty_like(x) for x in (query, key, value)
    )
    query_memory, key_memory, value_memory, gradient_memory, scores_memory = (
        Scratch(torch.float32) for _ in range(5)
    )
    sums_memory, products_memory, dropped_gradient_memory, key_sum_memory, value_sum_memory = (
        Scratch(torch.float32) for _ in range(5)
    )
    dropped_memory, score_gradient_memory, matmul_memory = (Scratch(query.dtype) for _ in range(3))

    def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = matmul_memory.of(left.shape[0], left.shape[1], right.shape[2])
        return torch.bmm(left, right, out=out)

    for group in options.groups(heads, rows, columns):
        group_query = query_memory.copy_of(query[group])
        group_key = key_memory.copy_of(key[group])
        group_gradient = gradient_memory.copy_of(gradient[group])
        group_value = value_memory.copy_of(value[group])
        key_sum = key_sum_memory.of(*key[group].shape).zero_()
        value_sum = value_sum_memory.of(*value[group].shape).zero_()
        for block, block_rows, block_columns in options.blocks(group, query, key, bias):
            shape = block.heads, block.rows, block.columns
            scores, dropped = scores_memory.of(*shape), dropped_memory.of(*shape)
            dropped_gradient = dropped_gradient_memory.of(*shape)
            score_gradient = score_gradient_memory.of(*shape)
            torch.bmm(group_query[:, block_rows], group_key[:, block_columns].mT, out=scores)
            torch.bmm(
                group_gradient[:, block_rows],
                group_value[:, block_columns].mT,
                out=dropped_gradient,
            )
            kernel.backward(
                ctypes.addressof(block),
                scores.data_ptr(),
                sums_memory.copy_of(sums[group, block_rows]).data_ptr(),
                products_memory.copy_of(row_products[group, block_rows]).data_ptr(),
                *(x.data_ptr() for x in (dropped_gradient, dropped, score_gradient)),
            )
            query_gradient[group, block_rows] = matmul(score_gradient, key[group, block_columns])
            key_sum[:, block_columns] += matmul(score_gradient.mT, query[group, block_rows])
            value_sum[:, block_columns] += matmul(dropped.mT, gradient[group, block_rows])
        key_gradient[group], value_gradient[group] = key_sum, value_sum
    return query_gradient, key_gradient, value_gradient


def _row_products(output: torch.Tensor, gradient: torch.Tensor, kernel: Kernel) -> torch.Tensor:
    """The dot product of each row of the output with its gradient, in float32."""
    products = torch.empty(output.shape[:2], dtype=torch.float32, device="cpu")
    kernel.row_products(
        *(x.data_ptr() for x in (output, gradient, products)),
        *(products.numel(), output.shape[2]),
        *(output.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    return products


IMPLEMENTATION = Implementation(_outputs, _gradients)
"""Takes queries of heads x rows x width, and keys and values of heads x columns x width."""
