"""Other rows, noise, and what is equal but for rounding, as the tests of a rule need them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch

Dims = tuple["int | None", ...]
"""For each of several tensors, the dimension that counts samples; ``None``: none does."""

SEED = 0
"""Of the noise; the same on all ranks."""

_FLOAT64_TOLERANCE = 1e-9
"""Difference between a shard's outputs and the whole call's in float64, relative to the largest
element: rounding of 1e-16, amplified by a network."""

_FLOAT64_ROUNDING = 1e-12
"""Difference in float64 between outputs of a sample beside other samples, relative to the largest
element. It is 0 unless sizes inside of the module depend on the samples, as those of a packed
sequence do."""


def root_mean_square(tensor: torch.Tensor) -> float:
    """Return the root mean square of the finite elements, 0 if there is none."""
    finite = torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor))
    return float(finite.abs().square().mean().sqrt()) if tensor.numel() else 0.0


def draw_normal(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return normally distributed numbers for each element; they are the same on all devices."""
    dtype = tensor.dtype if tensor.is_floating_point() or tensor.is_complex() else torch.float32
    return torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor.device)


def take_rows(given: Sequence[torch.Tensor], dims: Dims, rows: torch.Tensor) -> list[torch.Tensor]:
    """Return leaves with the rows of some numbers; if they are as many as before, with the same
    strides, by which kernels are chosen."""
    found = []
    for leaf, dim in zip(given, dims, strict=True):
        taken = leaf.detach()
        if dim is not None:
            taken = taken.index_select(dim, rows.to(leaf.device))
            if taken.shape == leaf.shape:
                taken = leaf.detach().clone().copy_(taken)
        found.append(taken)
    return found


def replace_others(
    given: Sequence[torch.Tensor], dims: Dims, start: int, stop: int
) -> list[torch.Tensor]:
    """Replace all rows but some: floating-point numbers get noise, and others are exchanged and
    reversed, since not every integer may be valid."""
    generator = torch.Generator().manual_seed(SEED)
    found = []
    for leaf, dim in zip(given, dims, strict=True):
        if dim is None:
            found.append(leaf)
            continue
        if leaf.is_floating_point() or leaf.is_complex():
            noise = 0.5 * (root_mean_square(leaf) or 1.0) * draw_normal(leaf, generator)
            changed = leaf.clone().add_(noise)  # with the strides of the leaf
        else:
            other_dims = [other for other in range(leaf.dim()) if other != dim]
            changed = leaf.clone().copy_(leaf.roll(1, dim).flip(other_dims[-1:]))
        changed.narrow(dim, start, stop - start).copy_(leaf.narrow(dim, start, stop - start))
        found.append(changed)
    return found


def storage_address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def have_equal_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same elements; NaN is equal to NaN."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one, other) or bool(
        ((one == other) | ((one != one) & (other != other))).all()
    )


def rounding_of(tensor: torch.Tensor) -> float:
    """Return the relative difference that may be rounding, of rows computed in calls of the same
    shapes."""
    return _FLOAT64_ROUNDING if tensor.dtype is torch.float64 else tolerance_of(tensor)


def are_close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by at most ``tolerance`` times the largest finite element."""
    if have_equal_bits(one, other):
        return True
    if not (one.is_floating_point() or one.is_complex()):
        return False
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    difference = torch.where(one.isfinite(), one - other, torch.zeros_like(one))
    return largest_magnitude(difference) <= tolerance * largest_magnitude(one)


def tolerance_of(tensor: torch.Tensor) -> float:
    """Return the relative difference that rounding may make; only float64 is compared closely."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    if tensor.dtype in (torch.float64, torch.complex128):
        return _FLOAT64_TOLERANCE
    return math.sqrt(torch.finfo(tensor.dtype).eps)


def largest_magnitude(tensor: torch.Tensor | None) -> float:
    """Return the largest magnitude of the finite elements, 0 if there is none."""
    if tensor is None or not tensor.numel():
        return 0.0
    return float(torch.where(tensor.isfinite(), tensor, torch.zeros_like(tensor)).abs().max())


def sum_present(tensors: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present).sum(0) if present else None


def or_zeros(tensor: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor:
    if tensor is not None:
        return tensor
    assert like is not None
    return torch.zeros_like(like)
