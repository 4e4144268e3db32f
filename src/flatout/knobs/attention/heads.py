"""Compute attention on the CPU with whole heads in one call of the kernel."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from flatout.knobs.attention.function import Implementation
from flatout.knobs.attention.kernel import ALWAYS, MASK, Block, Kernel, Options
from flatout.knobs.attention.sizes import MOST_COLUMNS, MOST_TRAINED, MOST_WIDTH


class Rows(ctypes.Structure):
    """The same as ``Rows`` in ``kernels/attention.c``."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "width")),
    )


class Heads(ctypes.Structure):
    """The same as ``Heads`` in ``kernels/attention.c``."""

    _fields_ = (
        ("block", Block),
        *((name, Rows) for name in ("query", "key", "value", "output")),
        *((f"of_{name}", Rows) for name in ("output", "query", "key", "value")),
        ("sums", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


@functools.cache
def _is_fast() -> bool:
    """Whether the processor has the registers for which the kernel's matmuls are written."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def is_supported(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the heads are small enough to be computed as a whole.

    Args:
        query, key, value: batch x heads x rows (or columns) x width.
    """
    rows, columns = query.shape[2], key.shape[2]
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    return (
        _is_fast()
        and max(query.shape[3], value.shape[3]) <= MOST_WIDTH
        and (max(rows, columns) <= MOST_TRAINED if trains else columns <= MOST_COLUMNS)
    )


def _outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    options: Options,
    kernel: Kernel,
) -> tuple[torch.Tensor, ...]:
    # Torch's attention gives its output the strides of the query, with dropout contiguous rows.
    if options.keep == ALWAYS and value.shape[3] == query.shape[3]:
        output = torch.empty_like(query)
    else:
        output = query.new_empty(*query.shape[:3], value.shape[3])
    sums = torch.empty(query.shape[:3], dtype=torch.float32, device="cpu")
    masks = []
    if options.keep < ALWAYS:
        masks_per_row = -(-key.shape[2] // MASK)
        masks = [torch.empty(*query.shape[:3], masks_per_row, dtype=torch.int16, device="cpu")]
    arguments = _arguments(query, key, value, bias, output, sums, options, *masks)
    _call(arguments, kernel, is_backward=False)
    return output, sums, *masks


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    *rest: Any,
) -> list[torch.Tensor]:
    *masks, gradient, options, kernel = rest
    gradients = [torch.empty_like(x) for x in (query, key, value)]
    arguments = _arguments(query, key, value, bias, output, sums, options, *masks)
    gradient = make_rows_contiguous(gradient)
    arguments.of_output = _rows(gradient)
    arguments.of_query, arguments.of_key, arguments.of_value = map(_rows, gradients)
    _call(arguments, kernel, is_backward=True)
    return gradients


def _call(arguments: Heads, kernel: Kernel, is_backward: bool) -> None:
    address = ctypes.addressof(arguments)
    count = arguments.block.threads * kernel.heads_scratch(address, is_backward)
    scratch = torch.empty(count, dtype=torch.float32, device="cpu")
    arguments.scratch = scratch.data_ptr()
    kernel.heads(address, is_backward)


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    options: Options,
    masks: torch.Tensor | None = None,
) -> Heads:
    block = options.whole(query, key.shape[2], bias)
    if masks is not None:
        block.kept = masks.data_ptr()
    return Heads(
        block=block,
        query=_rows(query),
        key=_rows(key),
        value=_rows(value),
        output=_rows(output),
        sums=sums.data_ptr(),
    )


def _rows(tensor: torch.Tensor) -> Rows:
    batch, head, row, _ = tensor.stride()
    return Rows(tensor.data_ptr(), batch, head, row, tensor.shape[3])


def make_rows_contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, such that the elements of each row are adjacent."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


IMPLEMENTATION = Implementation(_outputs, _gradients)
"""Takes queries of batch x heads x rows x width, and keys and values of batch x heads x columns x
width, all with contiguous rows."""
