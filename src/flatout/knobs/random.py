"""Random numbers: a parallel generator behind ``aten::bernoulli_``, through which dropout goes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flatout.knobs import Card, Facts, Knob, Match, Undo

if TYPE_CHECKING:
    import torch

    from flatout.agent.session import Session

NAME = "random"
OPERATOR = "aten::bernoulli_.float"

SERIAL_BELOW = 32768
"""Elements below which one thread does it: waking the others takes as long."""


def match(facts: Facts) -> Match:
    """Needs random numbers in the step."""
    if facts.lack("bernoulli"):
        return Match((), "its steps draw no random numbers to speak of")
    return Match(("fast",), share=facts.share("bernoulli"))


def apply(session: Session, setting: str) -> Undo:
    """Put the generator behind the operator, for every thread of this process."""
    from flatout.agent import dispatch

    return install(
        dispatch.compiled("bernoulli", "torch's own numbers"),
        paired=setting == "paired",
        on_failure=lambda error: session.contain(NAME, error),
    )


def install(kernel: ctypes.CDLL, paired: bool, on_failure: Callable[[Exception], None]) -> Undo:
    """Replace the CPU kernel of ``aten::bernoulli_``; returns what puts torch's own back.

    Args:
        kernel: the library of ``kernels/bernoulli.c``.
        paired: torch's kernel runs as well, on a copy that is thrown away, and leaves the
            generator as it would be without this.
        on_failure: called when a tensor could not be filled; torch's own kernel has done it then.
    """
    import torch

    from flatout.agent import dispatch

    own = torch.library.get_kernel(OPERATOR, "CPU")
    bernoulli = Bernoulli(kernel)

    def fill(keyset: Any, tensor: torch.Tensor, p: float, generator: Any) -> None:
        if not paired:
            bernoulli.fill(tensor, p, bernoulli.key(generator))
            return
        drawn_from = torch.default_generator if generator is None else generator
        before = drawn_from.get_state()
        key = bernoulli.key(generator)
        drawn_from.set_state(before)
        bernoulli.fill(tensor, p, key)
        own.call_boxed(keyset, torch.empty_like(tensor), p, generator=generator)

    def bernoulli_(
        keyset: Any, tensor: torch.Tensor, p: float = 0.5, *, generator: Any = None
    ) -> torch.Tensor:
        try:
            if bernoulli.can_fill(tensor, p):
                fill(keyset, tensor, p, generator)
                return tensor
        except Exception as error:  # noqa: BLE001 - reported
            on_failure(error)
        result: torch.Tensor = own.call_boxed(keyset, tensor, p, generator=generator)
        return result

    return dispatch.replace({"bernoulli_.float": bernoulli_}, "CPU")


class Bernoulli:
    """Fills tensors with the compiled kernel.

    Args:
        kernel: the library of ``kernels/bernoulli.c``.
    """

    def __init__(self, kernel: ctypes.CDLL) -> None:
        import torch

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
        self._fills: dict[torch.dtype, tuple[Callable[..., None], int]] = {
            dtype: (words[bits][0], one) for dtype, (bits, one) in ones.items()
        }
        self._threads = torch.get_num_threads
        self._empty = torch.empty
        self._int64 = torch.int64

    def can_fill(self, tensor: torch.Tensor, p: float) -> bool:
        """Whether it is a plain dense tensor, and ``p`` a probability."""
        import torch

        return (
            tensor.dtype in self._fills
            and 0.0 <= p <= 1.0
            and (
                tensor.is_contiguous()
                or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
                or (
                    tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d)
                )
            )
        )

    def key(self, generator: torch.Generator | None) -> int:
        """A key of 63 bits, drawn from the generator."""
        return int(self._empty((), dtype=self._int64).random_(generator=generator).item())

    def fill(self, tensor: torch.Tensor, p: float, key: int) -> None:
        """Fill with ones, each with probability ``p`` (to 2**-32), and zeros."""
        fill, one = self._fills[tensor.dtype]
        count = tensor.numel()
        threads = self._threads() if count >= SERIAL_BELOW else 1
        fill(tensor.data_ptr(), count, round(p * 2**32), one, key, threads)


KNOB = Knob(
    name=NAME,
    summary="dropout's random numbers from a parallel, vectorised generator",
    settings=("paired", "fast"),
    exactness={"paired": "resampled", "fast": "reshuffled"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="Puts a counter-based generator (Philox4x32-10), compiled for this processor, behind "
        "`aten::bernoulli_`, which every dropout on the CPU goes through. Each call draws one key "
        "from the generator it was given, so `torch.manual_seed`, generators and saved random "
        "states keep their meaning, and the result is the same for any number of threads. "
        "Torch's own kernel draws one number an element, so from the first dropout on the default "
        "generator is elsewhere than without the knob, and with it the order of a shuffled loader. "
        "`paired` lets torch's kernel run as well and leaves the generator as that does: the same "
        "data in the same order, at no gain; it is there for proofs. Needs a C compiler.",
        helps="Dropout on many elements: torch's generator on the CPU is serial, and takes up to a "
        "third of a step of a small GPT.",
        hurts="Where results must be repeated number by number from a run without it. In compiled "
        "regions it does nothing: Inductor has a generator of its own.",
        by_hand="Leave dropout out (`p=0`), or `torch.compile` the module, whose generator is fast "
        "as well.",
        sources=(
            "https://doi.org/10.1145/2063384.2063405 (Philox)",
            "https://docs.pytorch.org/docs/stable/library.html",
        ),
    ),
    match=match,
    apply=apply,
    claims=("the CPU kernel of aten::bernoulli_",),
    kernels=("bernoulli",),
)
