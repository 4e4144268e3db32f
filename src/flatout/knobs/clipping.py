"""Clipping of gradients by their norm, in one pass over them."""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.patch import Undo
from flatout.knob import Card, Facts, Knob, Match

if TYPE_CHECKING:
    import torch

    from flatout.intercept.host import Host


NAME = "clipping"

OPERATORS = ("linalg_vector_norm", "_foreach_norm")

SERIAL_BELOW = 65536
"""Elements below which one thread does it."""


def match(facts: Facts) -> Match:
    """Needs norms in the step."""
    if facts.lack(*OPERATORS):
        return Match((), "its steps do not clip gradients by their norm")
    if kernels.find_compiler() is None:
        return Match((), "there is no C compiler")
    return Match(("onepass",), share=facts.share(*OPERATORS, "::mul_"))


def apply(host: Host, setting: str) -> Undo:
    """Take the place of the two functions that ``torch.nn.utils.clip_grad_norm_`` consists of."""
    import torch
    from torch.nn.utils import clip_grad

    from flatout.intercept.patch import wrap_function

    try:
        clipping = OnePass(kernels.load("clipping"))
    except kernels.KernelError as error:
        raise RefusedError(f"torch's own clipping stays: {error}") from error
    functions: dict[str, Callable[..., Any]] = {
        "_get_total_norm": clipping.total_norm,
        "_clip_grads_with_norm_": clipping.clip,
    }
    if not functions.keys() <= vars(clip_grad).keys():
        raise RefusedError(f"torch {torch.__version__} clips in another way")
    on_failure = host.applied.on_failure_of(NAME)
    with contextlib.ExitStack() as undo:
        for name, function in functions.items():
            undo.callback(wrap_function(clip_grad, name, on_failure, function))
        return undo.pop_all().close


class OnePass:
    """Stands in for torch's functions, for gradients in float32 on the CPU; others are left to it.

    Args:
        library: of ``kernels/clipping.c``.
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
        own: Callable[..., torch.Tensor],
        tensors: torch.Tensor | Iterable[torch.Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        """As torch's function: the norm (scalar) of all elements of all tensors."""
        import torch

        from flatout.intercept import arrays

        # What can be gone through only once is torch's.
        if (
            isinstance(tensors, (list, tuple))
            and not torch.compiler.is_compiling()
            and norm_type == 2
            and tensors
            and arrays.are_contiguous_float32(tensors)
        ):
            total = arrays.call_kernel(self._sum_of_squares, tensors, SERIAL_BELOW)
            if total > torch.finfo(torch.float32).max:
                total = math.inf  # as it is for torch, which sums in float32
            if math.isfinite(total) or not error_if_nonfinite:
                engagement.calls[NAME] += 1
                return torch.tensor(math.sqrt(total), dtype=torch.float32, device="cpu")
        return own(tensors, norm_type, error_if_nonfinite, foreach)

    def clip(
        self,
        own: Callable[..., None],
        parameters: torch.Tensor | Iterable[torch.Tensor],
        max_norm: float,
        total_norm: torch.Tensor,
        foreach: bool | None = None,
    ) -> None:
        """As torch's function: multiply gradients by what brings their norm down to ``max_norm``.

        Where that is 1, nothing has to be written. Gradients that share memory are left to torch,
        which scales what they share twice.
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
                if factor != 1.0:
                    arrays.call_kernel(self._scale, grads, SERIAL_BELOW, factor)
                return
        own(parameters, max_norm, total_norm, foreach)


KNOB = Knob(
    name=NAME,
    summary="clipping of gradients by their norm, in one pass over them",
    settings=("onepass",),
    exactness={"onepass": "reordered"},
    hot=True,
    platforms=("cpu",),
    card=Card(
        what="`torch.nn.utils.clip_grad_norm_` takes a norm of each gradient, the norm of these, "
        "and multiplies every gradient by a factor, also where that is 1. `onepass` reads all "
        "gradients in one call of a kernel, with sums of float64, and writes them only where the "
        "factor is not 1. What it returns is the same but for rounding. Other norms than the "
        "second, and gradients that are not contiguous and in float32 on the CPU, are torch's. "
        "Needs a C compiler.",
        helps="Training on the CPU that clips gradients each step, as Hugging Face's Trainer does.",
        hurts="Nothing known.",
        by_hand="Clip seldom, or not at all where the norm stays below the limit: `norm = "
        "torch.nn.utils.get_total_norm(p.grad for p in model.parameters())`, and "
        "`torch.nn.utils.clip_grads_with_norm_(...)` only if it is larger.",
        sources=(
            "https://docs.pytorch.org/docs/stable/generated/torch.nn.utils.clip_grad_norm_.html",
        ),
    ),
    match=match,
    apply=apply,
    waits_for_calls=True,
    claims=("the clipping of gradients",),
    kernels=("clipping",),
)
