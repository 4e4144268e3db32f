"""Compute some convolutions on the CPU in an equivalent, faster form, below autograd.

In shapes, n is the number of images, i the number of input channels, o that of output channels, and
k x k the size of the kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

MOST_CHANNELS = 4
"""Maximum number of output channels of a transposed convolution that is computed as a plain
convolution: each of them needs as many channels of the plain convolution as a block has pixels."""

DTYPES = (torch.float32, torch.bfloat16)


class Settings(NamedTuple):
    """The arguments of a convolution other than tensors, as the operator gets them."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Settings:
        """The settings from the operator's arguments, with one number for each spatial
        dimension."""
        expanded: Any = (
            2 * tuple(a) if isinstance(a, Sequence) and len(a) == 1 else a for a in arguments
        )
        return cls(*expanded)

    @property
    def is_dense(self) -> bool:
        """Whether the convolution has neither groups nor dilation."""
        return self.groups == 1 and all(step == 1 for step in self.dilation)


def install(on_failure: OnFailure) -> Undo:
    """Replace convolutions and their backward pass; returns the undo.

    Args:
        on_failure: called with the exception if a replacement fails; torch's kernel is then used.
    """

    def convolution(
        torch_kernel: Callable[..., Any],
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *arguments: Any,
    ) -> torch.Tensor | None:
        return forward(images, weight, bias, Settings.of(arguments))

    def convolution_backward(
        torch_kernel: Callable[..., Any],
        gradient: torch.Tensor,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias_sizes: Any,
        *arguments: Any,
    ) -> Any:
        *settings, wanted = arguments
        fast = backward(gradient, images, weight, Settings.of(settings), wanted)
        is_missing = [w and f is None for w, f in zip(wanted, fast, strict=True)]
        if is_missing == list(wanted):
            return None
        if not any(is_missing):
            return fast
        rest = torch_kernel(gradient, images, weight, bias_sizes, *settings, is_missing)
        return tuple(r if f is None else f for f, r in zip(fast, rest, strict=True))

    functions: dict[str, dispatch.Override]
    functions = {"convolution": convolution, "convolution_backward": convolution_backward}
    return dispatch.override_operators(functions, "CPU", on_failure=on_failure, may_rest=True)


def forward(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: Settings
) -> torch.Tensor | None:
    """Compute a convolution in a faster form; ``None`` if there is none.

    Args:
        images: n x i x height x width.
        weight: i x o x k x k for a transposed convolution, o x i x k x k for a plain one.
        bias: o.
        how: the other arguments.
    """
    if not _is_supported(images, weight, how):
        return None
    if not how.transposed:
        if not _kernel_covers_images(images, weight, how):
            return None
        order = _memory_order(images)
        matrix, rows = (x.permute(order).flatten(1) for x in (weight, images))
        output = F.linear(rows, matrix, bias)[:, :, None, None]
        return _to_torchs_format(output, images, weight)
    if not _has_one_pixel(images, how):
        blocks = _convolve_by_blocks(images, weight, bias, how)
        return None if blocks is None else _to_torchs_format(blocks, images, weight)
    order = _memory_order(weight)
    matrix = weight.permute(order)
    expanded_bias: torch.Tensor | None = None
    if bias is not None:
        expanded_bias = bias[:, None, None].expand(weight.shape[1:])[None].permute(order).flatten()
    output = F.linear(images.flatten(1), matrix.flatten(1).t(), expanded_bias)
    output = output.view(len(images), *matrix.shape[1:])
    return _to_torchs_format(output.permute(_inverse(order)), images, weight)


def backward(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    how: Settings,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Compute the gradients of images, weight and bias that are wanted and have a faster form.

    Args:
        gradient: the gradient of the output.
        images, weight, how: the arguments of the convolution; see ``forward``.
        wanted: for each of the three gradients, whether it is needed.

    Returns:
        The three gradients, ``None`` for each that is not computed here.
    """
    if not _is_supported(images, weight, how) or gradient.dtype is not images.dtype:
        return None, None, None
    if how.transposed and _has_one_pixel(images, how):
        order = _memory_order(weight)
        matrix, rows = weight.permute(order), gradient.permute(order).flatten(1)
        of_images = rows.mm(matrix.flatten(1).t())[:, :, None, None] if wanted[0] else None
        of_weight = images.flatten(1).t().mm(rows).view(matrix.shape) if wanted[1] else None
        if of_weight is not None:
            of_weight = _to_torchs_format(of_weight.permute(_inverse(order)), images, weight)
        return (
            None if of_images is None else _to_torchs_format(of_images, images, weight),
            of_weight,
            gradient.sum((0, 2, 3)) if wanted[2] else None,
        )
    if _kernel_covers_images(images, weight, how) and not how.transposed:
        order = _memory_order(images)
        matrix, ordered_images = weight.permute(order), images.permute(order)
        rows = gradient.flatten(1)
        of_images = rows.mm(matrix.flatten(1)).view(ordered_images.shape) if wanted[0] else None
        of_weight = rows.t().mm(ordered_images.flatten(1)).view(matrix.shape) if wanted[1] else None
        if of_images is not None:
            of_images = _to_torchs_format(of_images.permute(_inverse(order)), images, weight)
        if of_weight is not None:
            of_weight = _to_torchs_format(of_weight.permute(_inverse(order)), images, weight)
        return of_images, of_weight, rows.sum(0) if wanted[2] else None
    if wanted[0] and not how.transposed and images.shape[1] <= MOST_CHANNELS:
        sizes = zip(images.shape[2:], gradient.shape[2:], how.stride, strict=True)
        if min(how.stride) > 1 and all(large == small * stride for large, small, stride in sizes):
            blocks = _convolve_by_blocks(gradient, weight, None, how)
            return (
                None if blocks is None else _to_torchs_format(blocks, images, weight),
                None,
                None,
            )
    return None, None, None


def _is_supported(images: torch.Tensor, weight: torch.Tensor, how: Settings) -> bool:
    return (
        images.dim() == 4
        and how.is_dense
        and images.dtype in DTYPES
        and weight.dtype is images.dtype
        and images.numel() > 0
        and dispatch.may_use_kernel(images, weight)
    )


def _has_one_pixel(images: torch.Tensor, how: Settings) -> bool:
    """Whether the images have one pixel, and a transposed convolution crops none of its kernel."""
    return images.shape[2:] == (1, 1) and not any(how.padding) and not any(how.output_padding)


def _kernel_covers_images(images: torch.Tensor, weight: torch.Tensor, how: Settings) -> bool:
    """Whether the kernel is as large as the images, so that the output has one pixel."""
    return images.shape[1:] == weight.shape[1:] and not any(how.padding)


def _convolve_by_blocks(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: Settings
) -> torch.Tensor | None:
    """Compute a transposed convolution with few output channels as a plain one and a pixel shuffle.

    The output consists of blocks of stride x stride pixels. The plain convolution has a channel for
    each pixel of a block.

    Args:
        images: n x i x height x width.
        weight: i x o x k x k.
        bias: o.
        how: the other arguments.

    Returns:
        The output, or ``None`` where the arguments do not allow this.
    """
    inputs, outputs, kernel, other = weight.shape
    stride, padding = how.stride[0], how.padding[0]
    if (
        outputs > MOST_CHANNELS
        or kernel != other
        or len(set(how.stride)) > 1
        or len(set(how.padding)) > 1
        or any(how.output_padding)
    ):
        return None
    taps = _taps(kernel, stride, padding)
    if taps is None:
        return None
    # A zero is appended, for the positions of the plain kernel that have no tap.
    padded = F.pad(weight.reshape(inputs, outputs, kernel * kernel), (0, 1))
    plain = padded[:, :, taps].permute(1, 2, 3, 0, 4, 5).flatten(0, 2)
    repeated_bias = None if bias is None else bias.repeat_interleave(stride * stride)
    pixels = F.conv2d(images, plain, repeated_bias, padding=taps.shape[-1] // 2)
    return F.pixel_shuffle(pixels, stride)


@functools.cache
def _taps(kernel: int, stride: int, padding: int) -> torch.Tensor | None:
    """The tap of the transposed kernel at each position of the plain kernel, per pixel of a block.

    In one dimension, pixel u of block b is pixel b stride + u of the output. Pixel b + d of the
    images contributes to it with tap u + padding - d stride. The plain kernel has one position for
    each d for which there is such a tap.

    Returns:
        stride x stride x plain x plain indices below kernel^2 into the flattened transposed kernel,
        or kernel^2 where there is no tap; ``None`` if the blocks do not cover the output, or the
        plain kernel is not centred.
    """
    contributions = [
        (u, d, u + padding - d * stride)
        for u in range(stride)
        for d in range(-kernel, kernel + 1)
        if 0 <= u + padding - d * stride < kernel
    ]
    reach = max((abs(d) for _, d, _ in contributions), default=0)
    is_centred = {d for _, d, _ in contributions} == set(range(-reach, reach + 1))
    if kernel - 2 * padding != stride or not is_centred:
        return None
    plain = 2 * reach + 1
    taps = torch.full((stride, stride, plain, plain), kernel * kernel, device="cpu")
    for u, d, tap in contributions:
        for v, e, other in contributions:
            taps[u, v, d + reach, e + reach] = tap * kernel + other
    return taps


def _memory_order(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """The permutation of dimensions that makes a contiguous or channels_last tensor contiguous."""
    return (0, 1, 2, 3) if tensor.is_contiguous() else (0, 2, 3, 1)


def _inverse(order: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The inverse of a permutation returned by ``_memory_order``."""
    return (0, 1, 2, 3) if order == (0, 1, 2, 3) else (0, 3, 1, 2)


def _to_torchs_format(
    result: torch.Tensor, images: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Convert a result to the memory format in which torch's convolution returns it.

    That is channels_last if one of the inputs is, and contiguous otherwise.
    """
    is_channels_last = _is_channels_last(images) or _is_channels_last(weight)
    return result.contiguous(
        memory_format=torch.channels_last if is_channels_last else torch.contiguous_format
    )


def _is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether torch considers the strides of a tensor to be channels_last.

    Strides of a tensor with one pixel or one channel fit both memory formats; torch then counts
    them as contiguous (``is_channels_last_strides_2d_s4`` in ``c10/core/MemoryFormat.h``).
    """
    sizes, strides = tensor.shape, tensor.stride()
    least_stride = 0
    if strides[1] == 0:
        return False
    for dimension in (1, 3, 2, 0):
        if strides[dimension] < least_stride or (dimension == 0 and least_stride == strides[1]):
            return False
        least_stride = strides[dimension] * max(sizes[dimension], 1)
    return True
