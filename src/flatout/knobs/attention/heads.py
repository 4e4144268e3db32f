"""Attention on the CPU of whole heads: all in one call of the kernel."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from flatout.knobs.attention.function import Way
from flatout.knobs.attention.kernel import ALWAYS, MASK, Block, Job, Kernel
from flatout.knobs.attention.sizes import MOST_COLUMNS, MOST_TRAINED, MOST_WIDTH


class Rows(ctypes.Structure):
    """``Rows`` of ``kernels/attention.c``."""

    _fields_ = (
        ("at", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "head", "row", "width")),
    )


class Heads(ctypes.Structure):
    """``Heads`` of ``kernels/attention.c``."""

    _fields_ = (
        ("block", Block),
        *((name, Rows) for name in ("query", "key", "value", "output")),
        *((f"of_{name}", Rows) for name in ("output", "query", "key", "value")),
        ("sums", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


@functools.cache
def _is_fast() -> bool:
    """Whether the processor has the registers that the kernel's products are made for."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def can_take(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether heads, batch x heads x rows x width each, are small enough."""
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
    job: Job,
    kernel: Kernel,
) -> tuple[torch.Tensor, ...]:
    # Torch's attention gives its output the query's layout, with dropout rows in order.
    if job.keep == ALWAYS and value.shape[3] == query.shape[3]:
        output = torch.empty_like(query)
    else:
        output = query.new_empty(*query.shape[:3], value.shape[3])
    sums = torch.empty(query.shape[:3], dtype=torch.float32, device="cpu")
    kept = []
    if job.keep < ALWAYS:
        masks = -(-key.shape[2] // MASK)
        kept = [torch.empty(*query.shape[:3], masks, dtype=torch.int16, device="cpu")]
    _call(_asked(query, key, value, bias, output, sums, job, *kept), kernel, backwards=False)
    return output, sums, *kept


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    *rest: Any,
) -> list[torch.Tensor]:
    *kept, gradient, job, kernel = rest
    found = [torch.empty_like(x) for x in (query, key, value)]
    asked = _asked(query, key, value, bias, output, sums, job, *kept)
    gradient = with_rows(gradient)
    asked.of_output = _rows(gradient)
    asked.of_query, asked.of_key, asked.of_value = map(_rows, found)
    _call(asked, kernel, backwards=True)
    return found


def _call(asked: Heads, kernel: Kernel, backwards: bool) -> None:
    at = ctypes.addressof(asked)
    count = asked.block.threads * kernel.heads_scratch(at, backwards)
    scratch = torch.empty(count, dtype=torch.float32, device="cpu")
    asked.scratch = scratch.data_ptr()
    kernel.heads(at, backwards)


def _asked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    sums: torch.Tensor,
    job: Job,
    kept: torch.Tensor | None = None,
) -> Heads:
    block = job.whole(query, key.shape[2], bias)
    if kept is not None:
        block.kept = kept.data_ptr()
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


def with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """One whose rows lie in one piece each."""
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


WAY = Way(_outputs, _gradients)
"""Of batch x heads x rows x width, batch x heads x columns x width (twice), ``with_rows``."""
