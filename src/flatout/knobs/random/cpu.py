"""Bernoulli numbers and dropout on the CPU from ``kernels/bernoulli.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from flatout.agent import dispatch
from flatout.knobs import Undo

BERNOULLI, DROPOUT = "aten::bernoulli_.float", "aten::dropout"

ALWAYS = 1 << 16
"""Dropout keeps an element where a half word lies below this times the probability of keeping."""

SPAN = 128
"""Elements whose bits are drawn at once."""

SERIAL_BELOW = 32768
"""Elements below which one thread does it: waking the others takes as long."""


def install(kernel: ctypes.CDLL, paired: bool, on_failure: Callable[[Exception], None]) -> Undo:
    """Replace ``aten::bernoulli_`` and ``aten::dropout`` on the CPU; returns what undoes that.

    Args:
        kernel: the library of ``kernels/bernoulli.c``.
        paired: torch's kernel runs as well, on a copy that is thrown away, and leaves the
            generator as it would be without this.
        on_failure: called when one could not be computed; torch's own kernel has done it then.
    """
    own = torch.library.get_kernel(BERNOULLI, "CPU")
    own_dropout = torch.library.get_kernel(DROPOUT, "AutogradCPU")
    bernoulli = Bernoulli(kernel, on_failure)

    def key_for(generator: torch.Generator | None, like: torch.Tensor, p: float) -> int:
        """A key; of one that is paired, the generator goes on as after torch's own kernel."""
        if not paired:
            return bernoulli.key(generator)
        drawn_from = torch.default_generator if generator is None else generator
        before = drawn_from.get_state()
        key = bernoulli.key(generator)
        drawn_from.set_state(before)
        keyset = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        own.call_boxed(keyset, torch.empty_like(like), p, generator=generator)
        return key

    def state_of(generator: torch.Generator | None) -> Callable[[], object]:
        """What brings a generator back to where it is now, which only ``paired`` promises."""
        if not paired:
            return lambda: None
        drawn_from = torch.default_generator if generator is None else generator
        state = drawn_from.get_state()
        return lambda: drawn_from.set_state(state)

    def bernoulli_(
        keyset: Any, tensor: torch.Tensor, p: float = 0.5, *, generator: Any = None
    ) -> torch.Tensor:
        if bernoulli.can_fill(tensor, p):
            bring_back = state_of(generator)
            try:
                bernoulli.fill(tensor, p, key_for(generator, tensor, p))
                return tensor
            except Exception as error:  # noqa: BLE001 - reported
                bring_back()
                on_failure(error)
        result: torch.Tensor = own.call_boxed(keyset, tensor, p, generator=generator)
        return result

    def dropout(keyset: Any, tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        if train and bernoulli.can_drop(tensor, p):
            bring_back = state_of(None)
            try:
                key = key_for(None, tensor.detach(), 1.0 - p)
                keep = round((1.0 - p) * ALWAYS)
                dropped: torch.Tensor = Dropout.apply(tensor, bits_of(tensor), keep, key, bernoulli)
                return dropped
            except Exception as error:  # noqa: BLE001 - reported
                bring_back()
                on_failure(error)
        result: torch.Tensor = own_dropout.call_boxed(keyset, tensor, p, train)
        return result

    put_back = dispatch.replace({"bernoulli_.float": bernoulli_}, "CPU")
    put_dropout_back = dispatch.replace({"dropout": dropout}, "AutogradCPU", "CPU")

    def undo() -> None:
        put_dropout_back()
        put_back()

    return undo


class Bernoulli:
    """Fills tensors with the compiled kernel.

    Args:
        kernel: the library of ``kernels/bernoulli.c``.
        on_failure: see ``install``.
    """

    def __init__(self, kernel: ctypes.CDLL, on_failure: Callable[[Exception], None]) -> None:
        self.on_failure = on_failure
        words = {
            8: (kernel.bernoulli_8, ctypes.c_uint8),
            16: (kernel.bernoulli_16, ctypes.c_uint16),
            32: (kernel.bernoulli_32, ctypes.c_uint32),
            64: (kernel.bernoulli_64, ctypes.c_uint64),
        }
        for function, word in words.values():
            function.restype = None
            function.argtypes = [
                *(ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, word),
                *(ctypes.c_uint64, ctypes.c_int),
            ]
        ones = {
            torch.float32: (32, 0x3F80_0000),
            torch.bfloat16: (16, 0x3F80),
            torch.float16: (16, 0x3C00),
            torch.float64: (64, 0x3FF0_0000_0000_0000),
            torch.bool: (8, 1),
            torch.uint8: (8, 1),
            torch.int8: (8, 1),
            torch.int16: (16, 1),
            torch.int32: (32, 1),
            torch.int64: (64, 1),
        }
        self._dropout = kernel.dropout
        self._dropout.restype = None
        self._dropout.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32),
            *(ctypes.c_float, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ]
        self._fills: dict[torch.dtype, tuple[Callable[..., None], int]] = {
            dtype: (words[bits][0], one) for dtype, (bits, one) in ones.items()
        }

    def can_fill(self, tensor: torch.Tensor, p: float) -> bool:
        """Whether it is a plain dense tensor, and ``p`` a probability."""
        return tensor.dtype in self._fills and 0.0 <= p <= 1.0 and _is_dense(tensor)

    def can_drop(self, tensor: torch.Tensor, p: float) -> bool:
        """Whether it is a large dense tensor, outside of anything that transforms."""
        return (
            tensor.numel() >= SERIAL_BELOW
            and 0 < round((1.0 - p) * ALWAYS) < ALWAYS
            and tensor.dtype in (torch.float32, torch.bfloat16)
            and dispatch.are_plain(tensor)
            and _is_dense(tensor)
        )

    def key(self, generator: torch.Generator | None) -> int:
        """A key of 63 bits, drawn from the generator."""
        return int(
            torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item()
        )

    def fill(self, tensor: torch.Tensor, p: float, key: int) -> None:
        """Fill with ones, each with probability ``p`` (to 2**-32), and zeros."""
        fill, one = self._fills[tensor.dtype]
        count = tensor.numel()
        threads = torch.get_num_threads() if count >= SERIAL_BELOW else 1
        fill(tensor.data_ptr(), count, round(p * 2**32), one, key, threads)

    def drop(
        self, tensor: torch.Tensor, bits: torch.Tensor, keep: int, key: int | None
    ) -> torch.Tensor:
        """A tensor like this, of its elements scaled up, or 0 times them.

        Args:
            tensor: dense.
            bits: what is kept, a bit an element in the order of memory (``bits_of``).
            keep: the probability of keeping, times ``ALWAYS``.
            key: by which ``bits`` are drawn; ``None``: they are there.
        """
        dropped = torch.empty_like(tensor)
        self._dropout(
            *(tensor.data_ptr(), dropped.data_ptr(), bits.data_ptr(), tensor.numel(), keep),
            *(ALWAYS / keep, key or 0, key is not None),
            *(tensor.dtype is torch.bfloat16, torch.get_num_threads()),
        )
        return dropped


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Room for a bit an element."""
    count = -(-tensor.numel() // SPAN) * SPAN // 8
    return torch.empty(count, dtype=torch.uint8, device="cpu")


class Dropout(torch.autograd.Function):
    """Dropout in one pass that keeps a bit an element for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        bits: torch.Tensor,
        keep: int,
        key: int | None,
        bernoulli: Bernoulli,
    ) -> torch.Tensor:
        """See ``Bernoulli.drop``."""
        ctx.save_for_backward(bits)
        ctx.keep, ctx.bernoulli, ctx.stride = keep, bernoulli, tensor.stride()
        return bernoulli.drop(tensor, bits, keep, key)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The same of the gradient, whose elements are brought into the order of the tensor's."""
        (bits,) = ctx.saved_tensors
        keep, bernoulli = ctx.keep, ctx.bernoulli
        if not torch._C._are_functorch_transforms_active():
            try:
                ordered = gradient
                if gradient.stride() != ctx.stride:
                    ordered = gradient.new_empty_strided(gradient.shape, ctx.stride)
                    ordered = ordered.copy_(gradient)
                return Dropout.apply(ordered, bits, keep, None, bernoulli), None, None, None, None
            except Exception as error:  # noqa: BLE001 - reported
                bernoulli.on_failure(error)
        kept = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten()
        factors = kept.to(gradient.dtype) * (ALWAYS / keep)
        return gradient * factors.as_strided(gradient.shape, ctx.stride), None, None, None, None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements lie without gaps or overlaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    elements = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != elements:
                return False
            elements *= size
    return True
