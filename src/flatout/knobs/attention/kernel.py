"""The functions of ``kernels/attention.c`` and their arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

BLOCK_BYTES = 1 << 21
"""The approximate size of a block of scores; it should fit into the cache."""

MASK = 16
"""Number of columns that share a 16-bit mask, which has a set bit for each probability that is
kept."""

BLOCK_ROWS = 128
"""Maximum number of rows of a block. Under a causal mask, a block has no columns beyond its last
row, so a smaller block saves more."""

ALWAYS = 1 << 16
"""The kernel keeps a probability if 16 random bits are below this number times the probability of
keeping."""


class Kernel:
    """The functions of ``kernels/attention.c``, without the prefix ``attention_``.

    Args:
        library: compiled from that source.
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
    """Scores of some rows of some heads; the same as ``Block`` in ``kernels/attention.c``."""

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


class Options(NamedTuple):
    """The arguments of attention other than tensors.

    Attributes:
        scale: the factor of the scores.
        is_causal: whether row ``r`` sees only columns 0 to ``r``.
        keep: the probability of keeping a probability, times ``ALWAYS``.
        key: the key of the random numbers.
        heads_per_batch: the number of heads of each element of the batch.
    """

    scale: float
    is_causal: bool
    keep: int
    key: int
    heads_per_batch: int

    def groups(self, heads: int, rows: int, columns: int) -> Iterator[slice]:
        """Split the heads into groups that are computed together."""
        depth = max(1, BLOCK_BYTES // (4 * _block_rows(rows) * columns))
        for first in range(0, heads, depth):
            yield slice(first, min(first + depth, heads))

    def whole(self, query: torch.Tensor, columns: int, bias: torch.Tensor | None) -> Block:
        """The block of all rows and columns of all heads.

        Args:
            query: batch x heads x rows x width.
            columns: the number of columns.
            bias: see ``blocks``.
        """
        batch, heads, rows, _ = query.shape
        block = self._block(bias, query.dtype, heads=batch * heads, rows=rows, columns=columns)
        block.all_rows, block.all_columns = rows, columns
        return block

    def _block(self, bias: torch.Tensor | None, dtype: torch.dtype, **extent: int) -> Block:
        block = Block(
            **extent,
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
        """Split some heads into blocks; yields each block with its rows and columns.

        Args:
            heads: the heads to split, as a range of all heads.
            query: all heads x rows x width.
            key: all heads x columns x width.
            bias: added to the scores; batch x heads per batch x rows x columns, expanded by strides
                of 0.
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
        for first in range(0, rows, _block_rows(rows)):
            last = min(first + _block_rows(rows), rows)
            block.first_row, block.rows = first, last - first
            block.columns = min(columns, last) if self.is_causal else columns
            yield block, slice(first, last), slice(0, block.columns)


def _block_rows(rows: int) -> int:
    return max(1, min(rows, BLOCK_ROWS))
