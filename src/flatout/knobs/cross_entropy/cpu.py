"""Cross entropy on the CPU, loss and gradient in one call of ``kernels/cross_entropy.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from flatout.agent import dispatch
from flatout.knobs import Undo

OPERATOR = "aten::cross_entropy_loss"

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


class CrossEntropy(torch.autograd.Function):
    """The loss; its gradient is computed with it, where one will be asked for."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, job: Job) -> torch.Tensor:
        """The loss in float32: of each row, or reduced to one number.

        Args:
            ctx: of autograd.
            logits: rows x classes, contiguous.
            targets: rows, contiguous.
            job: what is asked for.

        Raises:
            IndexError: a target is no class.
        """
        rows, classes = logits.shape
        losses = torch.empty(rows, dtype=torch.float32, device="cpu")
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        counted = rows - int((targets == job.ignored).sum())
        scale = 1.0 / counted if job.reduction == "mean" and counted else 1.0
        asked = Asked(
            *(rows, classes, logits.data_ptr(), targets.data_ptr(), job.ignored),
            *(job.smoothing, scale, logits.dtype is torch.bfloat16, torch.get_num_threads()),
        )
        at = None if gradient is None else gradient.data_ptr()
        if job.kernel(ctypes.addressof(asked), losses.data_ptr(), at):
            raise IndexError("a target is out of bounds")
        ctx.save_for_backward(targets, gradient)
        # Not saved with them: the program may change it after the loss, as with torch's own.
        ctx.logits, ctx.job = logits, job
        if job.reduction == "none":
            return losses
        total = losses.double().sum()
        return (total / counted if job.reduction == "mean" else total).float()

    @staticmethod
    def backward(ctx: Any, outer: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        """See ``forward``; what it returns can be differentiated when that is asked for."""
        targets, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():
            with torch.autocast("cpu", enabled=False):
                again = differentiable(ctx.logits, targets, ctx.job)
                (found,) = torch.autograd.grad(again, ctx.logits, outer, create_graph=True)
            return found, None, None
        if torch._C._autograd._get_current_graph_task_keep_graph():
            found = _scaled(gradient, outer)
            return found.clone() if found is gradient else found, None, None
        ctx.logits = None
        return _scaled(gradient, outer), None, None


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


def install(library: ctypes.CDLL, on_failure: Callable[[Exception], None]) -> Undo:
    """Replace cross entropy on the CPU; returns what puts torch's own back.

    Args:
        library: of ``kernels/cross_entropy.c``.
        on_failure: called when it could not be computed; torch's own way has been gone then.
    """
    kernel = library.cross_entropy
    kernel.restype = ctypes.c_int64
    kernel.argtypes = [ctypes.c_void_p] * 3
    below = dispatch.replace(
        {"cross_entropy_loss": _replacement("AutogradCPU", torch.float32, kernel, on_failure)},
        *("AutogradCPU", "CPU"),
    )
    under_autocast = dispatch.replace(
        {"cross_entropy_loss": _replacement("AutocastCPU", torch.bfloat16, kernel, on_failure)},
        "AutocastCPU",
    )

    def undo() -> None:
        under_autocast()
        below()

    return undo


def _replacement(
    key: str,
    dtype: torch.dtype,
    kernel: Callable[..., int],
    on_failure: Callable[[Exception], None],
) -> Callable[..., torch.Tensor]:
    """What stands behind the operator for a dispatch key; it takes logits of one dtype."""
    own = torch.library.get_kernel(OPERATOR, key)

    def cross_entropy(
        keyset: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor | None = None,
        reduction: int = 1,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        if (
            weight is None
            and 0.0 <= label_smoothing <= 1.0
            and logits.dtype is dtype
            and can_take(logits, targets)
        ):
            job = Job(REDUCTIONS[reduction], ignore_index, label_smoothing, kernel)
            try:
                loss: torch.Tensor = CrossEntropy.apply(
                    logits.contiguous(), targets.contiguous(), job
                )
                return loss
            except IndexError:
                pass  # torch says it in its own words
            except Exception as error:  # noqa: BLE001 - reported
                on_failure(error)
        result: torch.Tensor = own.call_boxed(
            keyset, logits, targets, weight, reduction, ignore_index, label_smoothing
        )
        return result

    return cross_entropy


def can_take(logits: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether these are plain tensors of such a loss, outside of anything that transforms."""
    return (
        logits.numel() >= FEWEST_LOGITS
        and logits.dim() == 2
        and targets.dtype is torch.int64
        and targets.shape == logits.shape[:1]
        and dispatch.are_plain(logits, targets)
    )
