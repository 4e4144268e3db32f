"""Computing samples, moments and digests of tensors for an inspection."""

from __future__ import annotations

import ctypes
import hashlib
import math
from array import array
from collections.abc import Iterable
from typing import Any

import torch


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a distributed tensor that this process holds, or any other tensor itself.
    The result is detached."""
    to_local = getattr(tensor, "to_local", None)
    local: torch.Tensor = tensor.detach() if to_local is None else to_local().detach()
    return local


def stored_values(tensor: torch.Tensor) -> torch.Tensor:
    """Return the local elements of a tensor as real numbers; only the stored elements of a sparse
    tensor."""
    tensor = local_part(tensor)
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


PART_ELEMENTS = 2**20
"""The largest number of elements of which a norm is computed at once."""


def summation_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype for sums: float64, or float32 on Metal, which has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def norm(values: torch.Tensor, order: float = 2.0) -> torch.Tensor:
    """Return the norm over all elements, as a scalar tensor.

    Torch makes a copy of what it sums in another dtype. Large tensors are summed in parts, so that
    the copy does not add to the peak memory of the program.
    """
    dtype = summation_dtype(values)
    if values.numel() <= PART_ELEMENTS:
        of_all: torch.Tensor = torch.linalg.vector_norm(values, ord=order, dtype=dtype)
        return of_all
    longest = max(range(values.dim()), key=lambda dim: values.shape[dim])
    parts = values.chunk(-(-values.numel() // PART_ELEMENTS), dim=longest)
    return norm(torch.stack([norm(part, order) for part in parts]), order)


def sample(values: torch.Tensor, elements: int) -> torch.Tensor:
    """Return every n-th element in the order of the indices, at most ``elements`` of them.

    n is coprime to the number of elements, so the sample does not stay within one column.
    """
    count = values.numel()
    stride = max(-(-count // elements), 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return values.reshape(-1)[::stride]


def moments(values: torch.Tensor) -> tuple[float, float]:
    """Return mean and root mean square of a tensor that is not empty."""
    dtype = summation_dtype(values)
    norm = float(torch.linalg.vector_norm(values, dtype=dtype))
    return float(values.mean(dtype=dtype)), norm / math.sqrt(values.numel())


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """Return the SHA-256 of dtypes, shapes and local elements, in hexadecimal."""
    result = hashlib.sha256()
    for tensor in tensors:
        result.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        on_host = _copy_to_host(local_part(tensor))
        result.update(_memory_of(on_host))
    return result.hexdigest()


def to_floats(values: torch.Tensor) -> array[float]:
    """Return the elements of a float32 tensor."""
    return array("f", _copy_bytes(values))


def to_ints(values: torch.Tensor) -> array[int]:
    """Return the elements of an int32 tensor."""
    return array("i", _copy_bytes(values))


def _copy_bytes(values: torch.Tensor) -> bytes:
    on_host = _copy_to_host(values)  # the variable keeps the memory alive
    return bytes(_memory_of(on_host))


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in host memory, with its elements in the order of their indices."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().cpu().contiguous()


def _memory_of(on_host: torch.Tensor) -> Any:
    """Return a view of the memory of a contiguous tensor, which must outlive the view. NumPy has a
    function for this, but may not be installed."""
    size_bytes = on_host.numel() * on_host.element_size()
    return (ctypes.c_char * size_bytes).from_address(on_host.data_ptr()) if size_bytes else b""
