"""Clip gradients by their norm in one pass over memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import handled_calls
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host


NAME = "clipping"

OPERATORS = ("linalg_vector_norm", "_foreach_norm")

SERIAL_BELOW = 65536
"""Below this number of elements, a kernel runs on one thread."""


def match(facts: Facts) -> Match:
    """Offer the setting where a step computes norms."""
    if facts.lack(*OPERATORS):
        return Match((), "no step clips gradients by their norm")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("onepass",), share=facts.share(*OPERATORS, "::mul_"))


def apply(host: Host, setting: str) -> Undo:
    """Replace the two functions that ``torch.nn.utils.clip_grad_norm_`` calls.

    Raises:
        RefusedError: the kernel cannot be built, or this torch does not have these functions.
    """
    import torch
    from torch.nn.utils import clip_grad

    from flatout.intercept.patch import wrap_function

    try:
        clipping = OnePass(kernels.load("clipping"))
    except kernels.KernelError as error:
        raise RefusedError(f"torch's own clipping is kept: {error}") from error
    functions: dict[str, Callable[..., Any]] = {
        "_get_total_norm": clipping.total_norm,
        "_clip_grads_with_norm_": clipping.clip,
    }
    if not functions.keys() <= vars(clip_grad).keys():
        raise RefusedError(f"torch {torch.__version__} implements clipping differently")
    on_failure = host.applied.on_failure_of(NAME)
    with contextlib.ExitStack() as undo:
        for name, function in functions.items():
            undo.callback(wrap_function(clip_grad, name, on_failure, function))
        return undo.pop_all().close


class OnePass:
    """Replacements for torch's functions, for float32 gradients on the CPU.

    They call torch's functions for all other gradients.

    Args:
        library: compiled from ``kernels/clipping.c``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self._sum_of_squares = library.sum_of_squares
        self._sum_of_squares.restype = ctypes.c_double
        self._sum_of_squares.argtypes = [pointer, pointer, size, ctypes.c_int]
        self._scale = library.scale
        self._scale.restype = None
        self._scale.argtypes = [pointer, pointer, size, ctypes.c_int, ctypes.c_float]

    def total_norm(
        self,
        original: Callable[..., torch.Tensor],
        tensors: torch.Tensor | Iterable[torch.Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """Compute the norm (a scalar) of all elements of all tensors, as ``original`` does."""
        import torch

        from flatout.intercept import arrays

        # An iterator can be read only once, so it is left to torch.
        if (
            isinstance(tensors, (list, tuple))
            and not torch.compiler.is_compiling()
            and norm_type == 2
            and tensors
            and arrays.are_contiguous_float32(tensors)
        ):
            total = arrays.call_kernel(self._sum_of_squares, tensors, SERIAL_BELOW)
            if total > torch.finfo(torch.float32).max:
                total = math.inf  # torch sums in float32 and gets infinity, too
            if math.isfinite(total) or not error_if_nonfinite:
                handled_calls.counts[NAME] += 1
                return torch.tensor(math.sqrt(total), dtype=torch.float32, device="cpu")
        return original(tensors, norm_type, error_if_nonfinite, foreach)

    def clip(
        self,
        original: Callable[..., None],
        parameters: torch.Tensor | Iterable[torch.Tensor],
        max_norm: float,
        total_norm: torch.Tensor,
        foreach: bool | None = None,
    ) -> None:
        """Scale the gradients so that their norm is at most ``max_norm``, as ``original`` does.

        Nothing is written where the factor is 1. Gradients that share memory are left to torch,
        which scales the shared memory twice.
        """
        import torch

        from flatout.intercept import arrays

        if isinstance(parameters, (list, tuple)) and not torch.compiler.is_compiling():
            grads = [p.grad for p in parameters if p.grad is not None]
            if arrays.are_contiguous_float32([*grads, total_norm]) and arrays.share_no_memory(
                grads
            ):
                with torch.no_grad():
                    factor = (float(max_norm) / (total_norm + 1e-6)).clamp(max=1.0).item()
                torch.autograd.graph.increment_version(grads)
                handled_calls.counts[NAME] += 1
                if factor != 1.0:
                    arrays.call_kernel(self._scale, grads, SERIAL_BELOW, factor)
                return
        original(parameters, max_norm, total_norm, foreach)


KNOB = Knob(
    name=NAME,
    summary="clip gradients by their norm in one pass over memory",
    settings=("onepass",),
    exactness={"onepass": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="The knob replaces the two halves of `torch.nn.utils.clip_grad_norm_` by a kernel "
        "that is compiled for this processor. Torch computes a norm of each gradient, "
        "then the norm of these norms, and multiplies every gradient by a factor, even if "
        "the factor is 1. `onepass` reads all gradients in one call, sums in float64, and "
        "writes the gradients only if the factor is not 1. The result differs by rounding "
        "errors. Torch still computes norms other than the 2-norm, and clips gradients "
        "that are not contiguous float32 tensors on the CPU. The knob needs a C compiler.",
        helps="The knob helps training on the CPU that clips gradients at each step, as Hugging "
        "Face's Trainer does.",
        hurts="No case is known.",
        by_hand="Clip less often, or only where the norm is above the limit: `norm = "
        "torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not "
        "None])`, and `torch.nn.utils.clip_grads_with_norm_(...)` only if it is larger.",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the clipping of gradients",),
    kernels=("clipping",),
    replaces=OPERATORS,
)
