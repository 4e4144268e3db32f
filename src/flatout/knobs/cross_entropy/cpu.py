"""Replace cross entropy on the CPU; one call of ``kernels/cross_entropy.c`` computes everything."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

FEWEST_LOGITS = 1 << 18
"""Smaller matrices are left to torch: the time saved is less than that of the Python call."""

REDUCTIONS = ("none", "mean", "sum")
"""The reductions, at their numbers in torch."""


class KernelArguments(ctypes.Structure):
    """The same as ``CrossEntropy`` in ``kernels/cross_entropy.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "classes")),
        *((name, ctypes.c_void_p) for name in ("logits", "targets")),
        ("ignored", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("smoothing", "scale")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "threads")),
    )


class Options(NamedTuple):
    """The arguments of cross entropy other than tensors, and the kernel.

    Attributes:
        reduction: one of ``REDUCTIONS``.
        ignored: rows with this target have no loss.
        smoothing: the label smoothing, from 0 to 1.
        kernel: the compiled kernel.
    """

    reduction: str
    ignored: int
    smoothing: float
    kernel: Callable[..., int]


class CrossEntropy(dispatch.RecordedFunction):
    """The autograd node of the loss; the gradient is computed together with the loss."""


class CrossEntropyBackward:
    """Returns the gradient of the loss; see ``dispatch.GradientRule``.

    Args:
        logits: rows x classes. They are not saved for backward, so the program may modify them
            after the loss, as with torch's own cross entropy.
        options: the other arguments.
        on_failure: called with the exception if ``gradients`` fails.
    """

    def __init__(self, logits: torch.Tensor, options: Options, on_failure: OnFailure) -> None:
        self._logits: torch.Tensor | None = logits
        self._version = logits._version
        self._options = options
        self.on_failure = on_failure

    def gradients(
        self, saved: Sequence[torch.Tensor], needed: Sequence[bool], outer: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        gradient = saved[1]
        scaled = _scale(gradient, outer)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return (scaled.clone() if scaled is gradient else scaled,)
        self._logits = None
        return (scaled,)

    def fallback_gradients(
        self, saved: Sequence[torch.Tensor], needed: Sequence[bool], outer: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        targets, gradient = saved
        logits = self._logits
        if not torch.is_grad_enabled() or logits is None:
            return (_scale(gradient, outer),)
        if logits._version != self._version:
            raise RuntimeError(
                "the second derivative of a cross entropy needs its logits, which have been "
                "modified by an inplace operation"
            )
        with torch.autocast("cpu", enabled=False):
            loss = compute_with_torch(logits, targets, self._options)
            (gradient,) = torch.autograd.grad(loss, logits, outer, create_graph=True)
        return (gradient,)


def compute(
    logits: torch.Tensor, targets: torch.Tensor, options: Options, trains: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the loss in float32, of each row or reduced to one number, and its gradient.

    Args:
        logits: rows x classes, contiguous.
        targets: rows, contiguous.
        options: the other arguments.
        trains: whether to compute the gradient of the logits.

    Returns:
        The loss, and the gradient in the dtype of the logits, or ``None``.

    Raises:
        IndexError: a target is neither a class nor ignored.
    """
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device="cpu")
    gradient = torch.empty_like(logits) if trains else None
    counted_rows = rows - int((targets == options.ignored).sum())
    scale = 1.0 / counted_rows if options.reduction == "mean" and counted_rows else 1.0
    arguments = KernelArguments(
        *(rows, classes, logits.data_ptr(), targets.data_ptr(), options.ignored),
        *(options.smoothing, scale, logits.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    gradient_address = None if gradient is None else gradient.data_ptr()
    if options.kernel(ctypes.addressof(arguments), losses.data_ptr(), gradient_address):
        raise IndexError("a target is out of bounds")
    if options.reduction == "none":
        return losses, gradient
    total = losses.double().sum()
    return (total / counted_rows if options.reduction == "mean" else total).float(), gradient


def _scale(gradient: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """Multiply the gradient of the logits by that of the loss, a scalar or one number per row."""
    if outer.dim():
        return (gradient.float() * outer[:, None]).to(gradient.dtype)
    try:
        factor = outer.item()
    except RuntimeError:  # a batch of factors, under vmap
        return (gradient.float() * outer).to(gradient.dtype)
    return gradient if factor == 1.0 else gradient * factor


def compute_with_torch(
    logits: torch.Tensor, targets: torch.Tensor, options: Options
) -> torch.Tensor:
    """Compute the loss with torch's operators, so that autograd can record them."""
    log_probabilities = F.log_softmax(logits.float(), 1)
    uniform_loss = -log_probabilities.mean(1) if options.smoothing else 0.0
    counts = targets != options.ignored
    target_loss = -log_probabilities.gather(1, targets.where(counts, 0)[:, None]).squeeze(1)
    losses = (1 - options.smoothing) * target_loss + options.smoothing * uniform_loss
    losses = losses * counts
    if options.reduction == "none":
        return losses
    return losses.sum() / counts.sum() if options.reduction == "mean" else losses.sum()


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace cross entropy on the CPU; returns the undo.

    Args:
        library: compiled from ``kernels/cross_entropy.c``.
        on_failure: called with the exception if the kernel fails; torch's kernels are then used.
    """
    kernel = library.cross_entropy
    kernel.restype = ctypes.c_int64
    kernel.argtypes = [ctypes.c_void_p] * 3

    def replace(dtype: torch.dtype, *keys: str) -> Undo:
        functions = {"cross_entropy_loss": _make_operator(dtype, kernel, on_failure)}
        return dispatch.override_operators(functions, *keys, on_failure=on_failure)

    with contextlib.ExitStack() as undo:
        undo.callback(replace(torch.float32, "AutogradCPU", "CPU"))
        undo.callback(replace(torch.bfloat16, "AutocastCPU"))
        return undo.pop_all().close


def _make_operator(
    dtype: torch.dtype, kernel: Callable[..., int], on_failure: OnFailure
) -> Callable[..., dispatch.DeferredCall | None]:
    """The function that replaces the operator for logits of one dtype."""

    def cross_entropy(
        torch_kernel: Callable[..., torch.Tensor],
        logits: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor | None = None,
        reduction: int = 1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> dispatch.DeferredCall | None:
        if (
            weight is not None
            or not 0.0 <= label_smoothing <= 1.0
            or logits.dtype is not dtype
            or not is_supported(logits, targets)
        ):
            return None
        options = Options(REDUCTIONS[reduction], ignore_index, label_smoothing, kernel)
        contiguous_targets = targets.contiguous()
        trains = torch.is_grad_enabled() and logits.requires_grad
        try:
            loss, gradient = compute(logits.contiguous(), contiguous_targets, options, trains)
        except IndexError:
            return None  # torch's kernel raises its own error
        return dispatch.DeferredCall(
            _record, (loss, gradient, logits, contiguous_targets, options, on_failure)
        )

    return cross_entropy


def _record(
    loss: torch.Tensor,
    gradient: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    options: Options,
    on_failure: OnFailure,
) -> torch.Tensor:
    backward = CrossEntropyBackward(logits, options, on_failure)
    return dispatch.record_in_graph(CrossEntropy, backward, loss, (targets, gradient), logits)


def is_supported(logits: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether these are plain tensors with class indices as targets, and large enough."""
    return (
        logits.numel() >= FEWEST_LOGITS
        and logits.dim() == 2
        and targets.dtype is torch.int64
        and targets.shape == logits.shape[:1]
        and dispatch.may_use_kernel(logits, targets)
    )
