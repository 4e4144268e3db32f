"""Bernoulli numbers and dropout on the CPU from ``kernels/bernoulli.c``."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

ALWAYS = 1 << 16
"""Dropout keeps an element where a half word lies below this times the probability of keeping."""

SPAN = 128
"""Elements whose bits are drawn at once."""

SERIAL_BELOW = 32768
"""Elements below which one thread does it: waking the others takes as long."""


def install(kernel: ctypes.CDLL, paired: bool, on_failure: OnFailure) -> Undo:
    """Replace ``aten::bernoulli_`` and ``aten::dropout`` on the CPU; returns what undoes that.

    Args:
        kernel: the library of ``kernels/bernoulli.c``.
        paired: torch's kernel runs as well, on a copy that is thrown away, and leaves the
            generator as it would be without this.
        on_failure: told when one could not be computed; torch's own kernel has done it then.
    """
    bernoulli = Bernoulli(kernel)

    def key_for(generator: torch.Generator | None, own: Callable[[], object] | None) -> int:
        """A key; of one that is paired, the generator goes on as after torch's own kernel."""
        if own is None:
            return bernoulli.key(generator)
        drawn_from = torch.default_generator if generator is None else generator
        before = drawn_from.get_state()
        key = bernoulli.key(generator)
        drawn_from.set_state(before)
        own()
        return key

    def bernoulli_(
        below: Callable[..., Any], tensor: torch.Tensor, p: float = 0.5, *, generator: Any = None
    ) -> torch.Tensor | None:
        if not bernoulli.can_fill(tensor, p):
            return None

        def own() -> None:
            below(torch.empty_like(tensor), p, generator=generator)

        with drawing(generator, paired):
            bernoulli.fill(tensor, p, key_for(generator, own if paired else None))
        return tensor

    def dropout(
        below: Callable[..., Any], tensor: torch.Tensor, p: float, train: bool
    ) -> dispatch.DeferredCall | None:
        if not train or not bernoulli.can_drop(tensor, p):
            return None

        def own() -> None:
            below(tensor.detach(), p, train)

        keep, bits = round((1.0 - p) * ALWAYS), bits_of(tensor)
        with drawing(None, paired):
            dropped = bernoulli.drop(tensor, bits, keep, key_for(None, own if paired else None))
        way = Kept(bernoulli, keep, tensor.stride(), on_failure)
        return dispatch.DeferredCall(
            dispatch.record_in_graph, (Dropout, way, dropped, (bits,), tensor)
        )

    with contextlib.ExitStack() as undo:
        undo.callback(
            dispatch.override_operators(
                {"bernoulli_.float": bernoulli_}, "CPU", on_failure=on_failure
            )
        )
        undo.callback(
            dispatch.override_operators(
                {"dropout": dropout}, "AutogradCPU", "CPU", on_failure=on_failure
            )
        )
        return undo.pop_all().close


@contextlib.contextmanager
def drawing(generator: torch.Generator | None, is_kept: bool) -> Iterator[None]:
    """Bring a generator back to where it was if something fails, which ``paired`` promises."""
    drawn_from = torch.default_generator if generator is None else generator
    state = drawn_from.get_state() if is_kept else None
    try:
        yield
    except BaseException:
        if state is not None:
            drawn_from.set_state(state)
        raise


class Bernoulli:
    """Fills tensors with the compiled kernel.

    Args:
        kernel: the library of ``kernels/bernoulli.c``.
    """

    def __init__(self, kernel: ctypes.CDLL) -> None:
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


class Dropout(dispatch.RecordedFunction):
    """Dropout in one pass that keeps a bit an element for the backward pass."""


class Kept(NamedTuple):
    """The gradient of dropout, which is dropout with the same bits.

    Attributes:
        bernoulli: computes it.
        keep: the probability of keeping, times ``ALWAYS``.
        stride: in which the bits lie.
        on_failure: see ``dispatch.GradientRule``.
    """

    bernoulli: Bernoulli
    keep: int
    stride: tuple[int, ...]
    on_failure: OnFailure

    def gradients(
        self, saved: Sequence[torch.Tensor], needed: Sequence[bool], gradient: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        (bits,) = saved
        if gradient.stride() != self.stride:
            gradient = gradient.new_empty_strided(gradient.shape, self.stride).copy_(gradient)
        return (self.bernoulli.drop(gradient, bits, self.keep, None),)

    def fallback_gradients(
        self, saved: Sequence[torch.Tensor], needed: Sequence[bool], gradient: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        (bits,) = saved
        if dispatch.are_plain(gradient):
            found = dispatch.attempt_below_autograd(
                self.on_failure, self.gradients, saved, needed, gradient.detach()
            )
            if found is not None:
                return (dispatch.record_in_graph(Dropout, self, *found, (bits,), gradient),)
        kept = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten()
        factors = kept.to(gradient.dtype) * (ALWAYS / self.keep)
        return (gradient * factors.as_strided(gradient.shape, self.stride),)


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
