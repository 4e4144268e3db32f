"""Convolutions on the CPU in another form, where that is faster: below autograd, for both passes.

Notation of shapes: n images, i channels that go in, o that come out, kernels of k x k.
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
"""That a transposed convolution gives, for it to be computed as a plain one: each costs as many
channels of the plain one as a block has pixels."""

DTYPES = (torch.float32, torch.bfloat16)


class How(NamedTuple):
    """The settings of a convolution, as the operator has them."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    transposed: bool
    output_padding: Sequence[int]
    groups: int

    @classmethod
    def of(cls, settings: Sequence[Any]) -> How:
        """The settings with one number for each side."""
        each: Any = (
            2 * tuple(s) if isinstance(s, Sequence) and len(s) == 1 else s for s in settings
        )
        return cls(*each)

    @property
    def is_dense_float32(self) -> bool:
        """Whether every channel goes into every other, without gaps."""
        return self.groups == 1 and all(gap == 1 for gap in self.dilation)


def install(on_failure: OnFailure) -> Undo:
    """Replace convolutions and their backward pass; returns what puts torch's own back.

    Args:
        on_failure: told when something here failed; torch's own kernel has done it then.
    """

    def convolution(
        below: Callable[..., Any],
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *settings: Any,
    ) -> torch.Tensor | None:
        return forward(images, weight, bias, How.of(settings))

    def convolution_backward(
        below: Callable[..., Any],
        gradient: torch.Tensor,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias_sizes: Any,
        *settings: Any,
    ) -> Any:
        *how, wanted = settings
        found = backward(gradient, images, weight, How.of(how), wanted)
        left = [w and f is None for w, f in zip(wanted, found, strict=True)]
        if left == list(wanted):
            return None
        if not any(left):
            return found
        rest = below(gradient, images, weight, bias_sizes, *how, left)
        return tuple(r if f is None else f for f, r in zip(found, rest, strict=True))

    functions: dict[str, dispatch.Override]
    functions = {"convolution": convolution, "convolution_backward": convolution_backward}
    return dispatch.override_operators(functions, "CPU", on_failure=on_failure)


def forward(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: How
) -> torch.Tensor | None:
    """The convolution, if there is a faster form of it.

    Args:
        images: n x i x height x width.
        weight: i x o x k x k of a transposed one, o x i x k x k of a plain one.
        bias: o.
        how: its settings.
    """
    if not _suits(images, weight, how):
        return None
    if not how.transposed:
        if not _covers_all(images, weight, how):
            return None
        order = _order(images)
        factor, rows = (x.permute(order).flatten(1) for x in (weight, images))
        return _like(F.linear(rows, factor, bias)[:, :, None, None], images, weight)
    if not _has_one_pixel(images, how):
        found = _in_blocks(images, weight, bias, how)
        return None if found is None else _like(found, images, weight)
    order = _order(weight)
    factor = weight.permute(order)
    spread: torch.Tensor | None = None
    if bias is not None:
        spread = bias[:, None, None].expand(weight.shape[1:])[None].permute(order).flatten()
    made = F.linear(images.flatten(1), factor.flatten(1).t(), spread)
    made = made.view(len(images), *factor.shape[1:])
    return _like(made.permute(_back(order)), images, weight)


def backward(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    how: How,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The gradients of images, weight and bias that are wanted and have a faster form."""
    if not _suits(images, weight, how) or gradient.dtype is not images.dtype:
        return None, None, None
    if how.transposed and _has_one_pixel(images, how):
        order = _order(weight)
        factor, rows = weight.permute(order), gradient.permute(order).flatten(1)
        of_images = rows.mm(factor.flatten(1).t())[:, :, None, None] if wanted[0] else None
        of_weight = images.flatten(1).t().mm(rows).view(factor.shape) if wanted[1] else None
        of_bias = gradient.sum((0, 2, 3)) if wanted[2] else None
        return (
            None if of_images is None else _like(of_images, images, weight),
            None if of_weight is None else _like(of_weight.permute(_back(order)), images, weight),
            of_bias,
        )
    if _covers_all(images, weight, how) and not how.transposed:
        order = _order(images)
        factor, meets, rows = weight.permute(order), images.permute(order), gradient.flatten(1)
        of_images = rows.mm(factor.flatten(1)).view(meets.shape) if wanted[0] else None
        of_weight = rows.t().mm(meets.flatten(1)).view(factor.shape) if wanted[1] else None
        return (
            None if of_images is None else _like(of_images.permute(_back(order)), images, weight),
            None if of_weight is None else _like(of_weight.permute(_back(order)), images, weight),
            rows.sum(0) if wanted[2] else None,
        )
    if wanted[0] and not how.transposed and images.shape[1] <= MOST_CHANNELS:
        sizes = zip(images.shape[2:], gradient.shape[2:], how.stride, strict=True)
        if min(how.stride) > 1 and all(size == of * stride for size, of, stride in sizes):
            found = _in_blocks(gradient, weight, None, how)
            return None if found is None else _like(found, images, weight), None, None
    return None, None, None


def _suits(images: torch.Tensor, weight: torch.Tensor, how: How) -> bool:
    return (
        images.dim() == 4
        and how.is_dense_float32
        and images.dtype in DTYPES
        and weight.dtype is images.dtype
        and images.numel() > 0
        and dispatch.are_plain(images, weight)
    )


def _has_one_pixel(images: torch.Tensor, how: How) -> bool:
    """Whether a transposed convolution meets images of one pixel, and gives its whole kernel."""
    return images.shape[2:] == (1, 1) and not any(how.padding) and not any(how.output_padding)


def _covers_all(images: torch.Tensor, weight: torch.Tensor, how: How) -> bool:
    """Whether a plain convolution's kernel is as large as its images, and meets them once."""
    return images.shape[1:] == weight.shape[1:] and not any(how.padding)


def _in_blocks(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, how: How
) -> torch.Tensor | None:
    """A transposed convolution to few channels: a plain one to the pixels of blocks, and these put
    in their places.

    Args:
        images: n x i x height x width.
        weight: i x o x k x k.
        bias: o.
        how: its settings.
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
    # One column of zeros, for the places in the plain kernel that no tap of the other one goes to.
    padded = F.pad(weight.reshape(inputs, outputs, kernel * kernel), (0, 1))
    plain = padded[:, :, taps].permute(1, 2, 3, 0, 4, 5).flatten(0, 2)
    spread = None if bias is None else bias.repeat_interleave(stride * stride)
    made = F.conv2d(images, plain, spread, padding=taps.shape[-1] // 2)
    return F.pixel_shuffle(made, stride)


@functools.cache
def _taps(kernel: int, stride: int, padding: int) -> torch.Tensor | None:
    """For each pixel of a block, and each place in the plain kernel, the tap that goes there.

    Along one side, pixel u of block b is at b stride + u, and gets pixel b + d of the images by tap
    u + padding - d stride. The plain kernel has all d for which there is one.

    Returns:
        stride x stride x plain x plain, a number below kernel^2, or kernel^2 for none; ``None``:
        blocks do not cover the output, or the plain kernel is not centred.
    """
    ways = [
        (u, d, u + padding - d * stride)
        for u in range(stride)
        for d in range(-kernel, kernel + 1)
        if 0 <= u + padding - d * stride < kernel
    ]
    reach = max((abs(d) for _, d, _ in ways), default=0)
    is_centred = {d for _, d, _ in ways} == set(range(-reach, reach + 1))
    if kernel - 2 * padding != stride or not is_centred:
        return None
    plain = 2 * reach + 1
    taps = torch.full((stride, stride, plain, plain), kernel * kernel, device="cpu")
    for u, d, tap in ways:
        for v, e, other in ways:
            taps[u, v, d + reach, e + reach] = tap * kernel + other
    return taps


def _order(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """The order of the dimensions in which a tensor lies in memory."""
    return (0, 1, 2, 3) if tensor.is_contiguous() else (0, 2, 3, 1)


def _back(order: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """From that order to the usual one."""
    return (0, 1, 2, 3) if order == (0, 1, 2, 3) else (0, 3, 1, 2)


def _like(made: torch.Tensor, images: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """In the layout that torch would have given it: where one of the two has its channels side by
    side, so has what is made of them."""
    is_last = _are_side_by_side(images) or _are_side_by_side(weight)
    return made.contiguous(
        memory_format=torch.channels_last if is_last else torch.contiguous_format
    )


def _are_side_by_side(tensor: torch.Tensor) -> bool:
    """Whether torch takes the strides of a tensor for ``channels_last``: those of one pixel and one
    channel, which are of every layout, it does not (``is_channels_last_strides_2d_s4`` in
    ``c10/core/MemoryFormat.h``)."""
    sizes, strides = tensor.shape, tensor.stride()
    least = 0
    if strides[1] == 0:
        return False
    for dimension in (1, 3, 2, 0):
        if strides[dimension] < least or (dimension == 0 and least == strides[1]):
            return False
        least = strides[dimension] * max(sizes[dimension], 1)
    return True
