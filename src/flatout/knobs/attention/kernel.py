"""What ``kernels/attention.c`` is asked for."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

BLOCK_BYTES = 1 << 21
"""Size of a block of scores, about, so that it stays in a cache."""

MASK = 16
"""Columns whose bits, kept or not, lie in a half word."""

BLOCK_ROWS = 128
"""Most rows of a block: under a causal mask, what lies right of a block's last row is left out."""

ALWAYS = 1 << 16
"""The kernel keeps a probability when a half word lies below this times that of keeping."""


class Kernel:
    """``kernels/attention.c``.

    Args:
        library: of it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        signatures: dict[str, tuple[Any, ...]] = {
            "attention_forward": (pointer,) * 4,
            "attention_backward": (pointer,) * 7,
            "row_products": (pointer, pointer, pointer, size, size, ctypes.c_int, ctypes.c_int),
            "dropout_factors": (pointer, pointer),
            "attention_heads": (pointer, ctypes.c_int),
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.restype = None
            function.argtypes = list(arguments)
            setattr(self, name.removeprefix("attention_"), function)
        library.heads_scratch.restype = ctypes.c_int64
        library.heads_scratch.argtypes = [ctypes.c_void_p, ctypes.c_int]
        self.heads_scratch = library.heads_scratch

    forward: Callable[..., None]
    backward: Callable[..., None]
    row_products: Callable[..., None]
    dropout_factors: Callable[..., None]
    heads: Callable[..., None]
    heads_scratch: Callable[..., int]


class Block(ctypes.Structure):
    """Scores of some rows of some heads, as ``Block`` of ``kernels/attention.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("first_head", "first_row")),
        *((name, ctypes.c_int64) for name in ("all_rows", "all_columns", "heads_per_batch")),
        ("bias", ctypes.c_void_p),
        *((f"bias_{name}", ctypes.c_int64) for name in ("batch", "head", "row", "column")),
        ("key", ctypes.c_uint64),
        ("kept", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("keep", ctypes.c_uint32),
        *((name, ctypes.c_int32) for name in ("causal", "is_bf16", "threads")),
    )


class Job(NamedTuple):
    """What is asked for, besides the tensors.

    Attributes:
        scale: of the scores.
        is_causal: whether row ``r`` sees columns 0 to ``r``.
        keep: probability of keeping a probability, times ``ALWAYS``.
        key: of the random numbers.
        heads_per_batch: how many heads share a row of the bias's first dimension.
    """

    scale: float
    is_causal: bool
    keep: int
    key: int
    heads_per_batch: int

    def groups(self, heads: int, rows: int, columns: int) -> Iterator[slice]:
        """Heads that are worked on together."""
        depth = max(1, BLOCK_BYTES // (4 * _height(rows) * columns))
        for first in range(0, heads, depth):
            yield slice(first, min(first + depth, heads))

    def whole(self, query: torch.Tensor, columns: int, bias: torch.Tensor | None) -> Block:
        """All rows and columns of all heads.

        Args:
            query: batch x heads x rows x width.
            columns: of a row.
            bias: see ``blocks``.
        """
        batch, heads, rows, _ = query.shape
        block = self._block(bias, query.dtype, heads=batch * heads, rows=rows, columns=columns)
        block.all_rows, block.all_columns = rows, columns
        return block

    def _block(self, bias: torch.Tensor | None, dtype: torch.dtype, **places: int) -> Block:
        block = Block(
            **places,
            heads_per_batch=self.heads_per_batch,
            key=self.key,
            scale=self.scale,
            keep=self.keep,
            causal=self.is_causal,
            is_bf16=dtype is torch.bfloat16,
            threads=torch.get_num_threads(),
        )
        if bias is not None:
            block.bias = bias.data_ptr()
            block.bias_batch, block.bias_head, block.bias_row, block.bias_column = bias.stride()
        return block

    def blocks(
        self, heads: slice, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None
    ) -> Iterator[tuple[Block, slice, slice]]:
        """The blocks of some heads, with the rows and columns that they are made of.

        Args:
            heads: of all of them.
            query: all heads x rows x width.
            key: all heads x columns x width.
            bias: batch x heads per batch x rows x columns, or what broadcasts to it by strides.
        """
        rows, columns = query.shape[1], key.shape[1]
        block = self._block(
            bias,
            query.dtype,
            first_head=heads.start,
            heads=heads.stop - heads.start,
            all_rows=rows,
            all_columns=columns,
        )
        for first in range(0, rows, _height(rows)):
            last = min(first + _height(rows), rows)
            block.first_row, block.rows = first, last - first
            block.columns = min(columns, last) if self.is_causal else columns
            yield block, slice(first, last), slice(0, block.columns)


def _height(rows: int) -> int:
    return max(1, min(rows, BLOCK_ROWS))
