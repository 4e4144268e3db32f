"""Replace ``aten::bernoulli_`` and dropout on the CPU by ``kernels/bernoulli.c``."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from flatout.errors import RefusedError
from flatout.intercept import dispatch, twister
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

ALWAYS = 1 << 16
"""Dropout keeps an element if 16 random bits are below this number times the probability of
keeping."""

SPAN = 128
"""Number of elements whose bits the kernel draws at once."""

SAME_FROM = 4096
"""Elements from which on it pays to copy the generator's state, to draw as torch does."""

SERIAL_BELOW = 32768
"""Smaller tensors are filled on one thread: waking the others takes as long."""


def install(kernel: ctypes.CDLL, paired: bool, on_failure: OnFailure) -> Undo:
    """Replace ``aten::bernoulli_`` and ``aten::dropout`` on the CPU; returns the undo.

    Args:
        kernel: the library compiled from ``kernels/bernoulli.c``.
        paired: whether to run torch's kernel as well, on a copy that is thrown away, so that the
            generator advances as it does without the replacement.
        on_failure: called with the exception if a replacement fails; torch's kernel is then used.
    """
    bernoulli = Bernoulli(kernel)

    def draw_key(generator: torch.Generator | None, run_torchs: Callable[[], object] | None) -> int:
        """Draw a key; with ``run_torchs``, leave the generator as torch's kernel leaves it."""
        if run_torchs is None:
            return bernoulli.key(generator)
        source = torch.default_generator if generator is None else generator
        state = source.get_state()
        key = bernoulli.key(generator)
        source.set_state(state)
        run_torchs()
        return key

    def bernoulli_(
        torch_kernel: Callable[..., Any],
        tensor: torch.Tensor,
        p: float = 0.5,
        *,
        generator: Any = None,
    ) -> torch.Tensor | None:
        if not bernoulli.can_fill(tensor, p):
            return None

        def run_torchs() -> None:
            torch_kernel(torch.empty_like(tensor), p, generator=generator)

        with restoring_on_error(generator, paired):
            bernoulli.fill(tensor, p, draw_key(generator, run_torchs if paired else None))
        return tensor

    def dropout(
        torch_kernel: Callable[..., Any], tensor: torch.Tensor, p: float, train: bool
    ) -> dispatch.DeferredCall | None:
        if not train or not bernoulli.can_drop(tensor, p):
            return None

        def run_torchs() -> None:
            torch_kernel(tensor.detach(), p, train)

        keep, bits = round((1.0 - p) * ALWAYS), empty_bits(tensor)
        with restoring_on_error(None, paired):
            key = draw_key(None, run_torchs if paired else None)
            dropped = bernoulli.drop(tensor, bits, keep, key)
        backward = DropoutBackward(bernoulli, keep, tensor.stride(), on_failure)
        return dispatch.DeferredCall(
            dispatch.record_in_graph, (Dropout, backward, dropped, (bits,), tensor)
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
def restoring_on_error(generator: torch.Generator | None, paired: bool) -> Iterator[None]:
    """With ``paired``, restore a generator's state if an exception is raised.

    Torch's kernel, which is then used, must find the generator as it would be without the knob.
    """
    source = torch.default_generator if generator is None else generator
    state = source.get_state() if paired else None
    try:
        yield
    except BaseException:
        if state is not None:
            source.set_state(state)
        raise


def install_same(on_failure: OnFailure) -> Undo:
    """Draw torch's own numbers many at once; returns the undo.

    Args:
        on_failure: called with the exception if that fails; torch's kernel is then used.

    Raises:
        RefusedError: torch draws other numbers here, or the kernel is not available.
    """
    dispatch.load_kernel("twister", "torch's own kernel")
    if not twister.agrees():
        raise RefusedError("torch's own kernel stays: it draws other numbers here, by MKL")

    def bernoulli_(
        torch_kernel: Callable[..., Any],
        tensor: torch.Tensor,
        p: float = 0.5,
        *,
        generator: Any = None,
    ) -> torch.Tensor | None:
        if tensor.numel() < SAME_FROM or not twister.can_fill(tensor, p, generator):
            return None
        return tensor if twister.fill(tensor, p, generator) else None

    return dispatch.override_operators(
        {"bernoulli_.float": bernoulli_}, "CPU", on_failure=on_failure
    )


class Bernoulli:
    """Calls the compiled kernel.

    Args:
        kernel: the library compiled from ``kernels/bernoulli.c``.
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
        self._dropout = kernel.dropout
        self._dropout.restype = None
        self._dropout.argtypes = [
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32),
            *(ctypes.c_float, ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ]
        self._fills: dict[torch.dtype, tuple[Callable[..., None], int]] = {
            dtype: (words[bits][0], one) for dtype, (bits, one) in twister.ONES.items()
        }

    def can_fill(self, tensor: torch.Tensor, p: float) -> bool:
        """Whether ``tensor`` is dense and of a supported dtype, and ``p`` is a probability."""
        return tensor.dtype in self._fills and 0.0 <= p <= 1.0 and twister.is_dense(tensor)

    def can_drop(self, tensor: torch.Tensor, p: float) -> bool:
        """Whether ``tensor`` is large, dense and of a supported dtype, and not transformed."""
        return (
            tensor.numel() >= SERIAL_BELOW
            and 0 < round((1.0 - p) * ALWAYS) < ALWAYS
            and tensor.dtype in (torch.float32, torch.bfloat16)
            and dispatch.may_use_kernel(tensor)
            and twister.is_dense(tensor)
        )

    def key(self, generator: torch.Generator | None) -> int:
        """Draw a key of 63 bits from the generator."""
        return int(
            torch.empty((), dtype=torch.int64, device="cpu").random_(generator=generator).item()
        )

    def fill(self, tensor: torch.Tensor, p: float, key: int) -> None:
        """Fill a tensor in place with ones, each with probability ``p`` (to 2^-32), and zeros."""
        fill, one = self._fills[tensor.dtype]
        count = tensor.numel()
        threads = torch.get_num_threads() if count >= SERIAL_BELOW else 1
        fill(tensor.data_ptr(), count, round(p * 2**32), one, key, threads)

    def drop(
        self, tensor: torch.Tensor, bits: torch.Tensor, keep: int, key: int | None
    ) -> torch.Tensor:
        """Apply dropout: returns the elements multiplied by 0, or by 1 / the probability of
        keeping.

        Args:
            tensor: dense.
            bits: one bit per element in the order of memory, set if it is kept (``empty_bits``).
            keep: the probability of keeping, times ``ALWAYS``.
            key: the key with which ``bits`` are drawn; ``None``: ``bits`` are used as they are.
        """
        dropped = torch.empty_like(tensor)
        self._dropout(
            *(tensor.data_ptr(), dropped.data_ptr(), bits.data_ptr(), tensor.numel(), keep),
            *(ALWAYS / keep, key or 0, key is not None),
            *(tensor.dtype is torch.bfloat16, torch.get_num_threads()),
        )
        return dropped


def empty_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Allocate one bit for each element of a tensor."""
    count = -(-tensor.numel() // SPAN) * SPAN // 8
    return torch.empty(count, dtype=torch.uint8, device="cpu")


class Dropout(dispatch.RecordedFunction):
    """The autograd node of dropout, which saves one bit per element."""


class DropoutBackward(NamedTuple):
    """Computes the gradient of dropout: dropout with the same bits; see ``dispatch.GradientRule``.

    Attributes:
        bernoulli: calls the kernel.
        keep: the probability of keeping, times ``ALWAYS``.
        stride: the strides of the tensor whose order in memory the bits have.
        on_failure: called with the exception if ``gradients`` fails.
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
        if dispatch.may_use_kernel(gradient):
            gradients = dispatch.attempt_below_autograd(
                self.on_failure, self.gradients, saved, needed, gradient.detach()
            )
            if gradients is not None:
                return (dispatch.record_in_graph(Dropout, self, *gradients, (bits,), gradient),)
        is_kept = (bits[:, None] >> torch.arange(8, dtype=torch.uint8, device="cpu") & 1).flatten()
        factors = is_kept.to(gradient.dtype) * (ALWAYS / self.keep)
        return (gradient * factors.as_strided(gradient.shape, self.stride),)
