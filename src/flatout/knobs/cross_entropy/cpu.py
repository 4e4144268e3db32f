"""Cross entropy on the CPU, loss and gradient in one call of ``kernels/cross_entropy.c``."""

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
"""Below, what is saved is not worth the way through Python."""

REDUCTIONS = ("none", "mean", "sum")
"""By their numbers in torch."""


class Asked(ctypes.Structure):
    """``CrossEntropy`` of ``kernels/cross_entropy.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "classes")),
        *((name, ctypes.c_void_p) for name in ("logits", "targets")),
        ("ignored", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("smoothing", "scale")),
        *((name, ctypes.c_int32) for name in ("is_bf16", "threads")),
    )


class Job(NamedTuple):
    """What is asked for, besides the tensors.

    Attributes:
        reduction: one of ``REDUCTIONS``.
        ignored: the target whose row does not count.
        smoothing: of the labels.
        kernel: the compiled part.
    """

    reduction: str
    ignored: int
    smoothing: float
    kernel: Callable[..., int]


class CrossEntropy(dispatch.RecordedFunction):
    """The loss; its gradient is computed with it, where one will be asked for."""


class Loss:
    """How its gradient is computed; see ``dispatch.GradientRule``.

    Args:
        logits: rows x classes. They are not saved: the program may change them after the loss, as
            with torch's own.
        job: what is asked for.
        on_failure: told of a failure.
    """

    def __init__(self, logits: torch.Tensor, job: Job, on_failure: OnFailure) -> None:
        self._logits: torch.Tensor | None = logits
        self._version = logits._version
        self._job = job
        self.on_failure = on_failure

    def gradients(
        self, saved: Sequence[torch.Tensor], needed: Sequence[bool], outer: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        gradient = saved[1]
        found = _scaled(gradient, outer)
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return (found.clone() if found is gradient else found,)
        self._logits = None
        return (found,)

    def fallback_gradients(
        self, saved: Sequence[torch.Tensor], needed: Sequence[bool], outer: torch.Tensor
    ) -> tuple[torch.Tensor]:
        """See ``dispatch.GradientRule``."""
        targets, gradient = saved
        logits = self._logits
        if not torch.is_grad_enabled() or logits is None:
            return (_scaled(gradient, outer),)
        if logits._version != self._version:
            raise RuntimeError(
                "the second derivative of a cross entropy needs its logits, which have been "
                "modified by an inplace operation"
            )
        with torch.autocast("cpu", enabled=False):
            loss = differentiable(logits, targets, self._job)
            (found,) = torch.autograd.grad(loss, logits, outer, create_graph=True)
        return (found,)


def computed(
    logits: torch.Tensor, targets: torch.Tensor, job: Job, trains: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The loss in float32 (of each row, or reduced to one number), and its gradient if it trains.

    Args:
        logits: rows x classes, contiguous.
        targets: rows, contiguous.
        job: what is asked for.
        trains: whether its gradient may be asked for.

    Raises:
        IndexError: a target is no class.
    """
    rows, classes = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device="cpu")
    gradient = torch.empty_like(logits) if trains else None
    counted = rows - int((targets == job.ignored).sum())
    scale = 1.0 / counted if job.reduction == "mean" and counted else 1.0
    asked = Asked(
        *(rows, classes, logits.data_ptr(), targets.data_ptr(), job.ignored),
        *(job.smoothing, scale, logits.dtype is torch.bfloat16, torch.get_num_threads()),
    )
    at = None if gradient is None else gradient.data_ptr()
    if job.kernel(ctypes.addressof(asked), losses.data_ptr(), at):
        raise IndexError("a target is out of bounds")
    if job.reduction == "none":
        return losses, gradient
    total = losses.double().sum()
    return (total / counted if job.reduction == "mean" else total).float(), gradient


def _scaled(gradient: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
    """The gradient for a factor of the loss, or for one of each row."""
    if outer.dim():
        return (gradient.float() * outer[:, None]).to(gradient.dtype)
    try:
        factor = outer.item()
    except RuntimeError:  # a batch of factors, under vmap
        return (gradient.float() * outer).to(gradient.dtype)
    return gradient if factor == 1.0 else gradient * factor


def differentiable(logits: torch.Tensor, targets: torch.Tensor, job: Job) -> torch.Tensor:
    """The same in operations of torch."""
    chances = F.log_softmax(logits.float(), 1)
    smooth = -chances.mean(1) if job.smoothing else 0.0
    counts = targets != job.ignored
    picked = -chances.gather(1, targets.where(counts, 0)[:, None]).squeeze(1)
    losses = ((1 - job.smoothing) * picked + job.smoothing * smooth) * counts
    if job.reduction == "none":
        return losses
    return losses.sum() / counts.sum() if job.reduction == "mean" else losses.sum()


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace cross entropy on the CPU; returns what puts torch's own back.

    Args:
        library: of ``kernels/cross_entropy.c``.
        on_failure: told when it could not be computed; torch's own way has been gone then.
    """
    kernel = library.cross_entropy
    kernel.restype = ctypes.c_int64
    kernel.argtypes = [ctypes.c_void_p] * 3

    def put(dtype: torch.dtype, *keys: str) -> Undo:
        functions = {"cross_entropy_loss": _function(dtype, kernel, on_failure)}
        return dispatch.override_operators(functions, *keys, on_failure=on_failure)

    with contextlib.ExitStack() as undo:
        undo.callback(put(torch.float32, "AutogradCPU", "CPU"))
        undo.callback(put(torch.bfloat16, "AutocastCPU"))
        return undo.pop_all().close


def _function(
    dtype: torch.dtype, kernel: Callable[..., int], on_failure: OnFailure
) -> Callable[..., dispatch.DeferredCall | None]:
    """What stands behind the operator; it takes logits of one dtype."""

    def cross_entropy(
        below: Callable[..., torch.Tensor],
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
            or not can_take(logits, targets)
        ):
            return None
        job = Job(REDUCTIONS[reduction], ignore_index, label_smoothing, kernel)
        rows, classes = logits.contiguous(), targets.contiguous()
        trains = torch.is_grad_enabled() and logits.requires_grad
        try:
            loss, gradient = computed(rows, classes, job, trains)
        except IndexError:
            return None  # torch says it in its own words
        return dispatch.DeferredCall(_recorded, (loss, gradient, logits, classes, job, on_failure))

    return cross_entropy


def _recorded(
    loss: torch.Tensor,
    gradient: torch.Tensor | None,
    logits: torch.Tensor,
    targets: torch.Tensor,
    job: Job,
    on_failure: OnFailure,
) -> torch.Tensor:
    way = Loss(logits, job, on_failure)
    return dispatch.record_in_graph(CrossEntropy, way, loss, (targets, gradient), logits)


def can_take(logits: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether these are plain tensors of such a loss, outside of anything that transforms."""
    return (
        logits.numel() >= FEWEST_LOGITS
        and logits.dim() == 2
        and targets.dtype is torch.int64
        and targets.shape == logits.shape[:1]
        and dispatch.are_plain(logits, targets)
    )
