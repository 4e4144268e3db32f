"""Replacements for operators under autocast, which run in float32 or return float32.

Some operators lose too much accuracy in half precision. ``torch.autocast`` runs many of them in
float32 on CUDA, few on the CPU, and the sigmoid on neither: in bfloat16 it is exactly 1 from 6.2
on, where ``log(1 - p)`` in ``BCELoss`` is clamped. The kernels registered here for the autocast
dispatch key close that gap. The last matmul or convolution of each module (its head, whose output
goes into the loss) runs in float32 as well, unless the module returns its hyperbolic tangent; such
a module generates data, such as images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from flatout.errors import RefusedError
from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.nested import map_tensors, tensors_in
from flatout.knobs.precision.scout import HALVES, weight_of

FLOAT32 = (
    *("sigmoid", "log_sigmoid", "softplus", "softmax.int", "log_softmax.int", "logsumexp"),
    *("exp", "log", "log2", "log10", "log1p", "pow.Tensor_Scalar", "cumsum", "norm.Scalar"),
    *("layer_norm", "group_norm", "rms_norm"),
)
"""Operators that run in float32: those that autocast runs in float32 on CUDA, as far as they matter
in training, and in addition sigmoids and norms.
https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference

Batch norm is not among them: its kernels compute means and variances in float32 for any input, and
its output is rounded only once, for a matmul that would round it anyway."""

HEADS = (
    *("linear", "conv1d", "conv2d", "conv3d", "addmm"),
    *("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"),
)
"""Operators that can be a module's head; the weight is their second or third argument."""

LOWERED = (
    *HEADS,
    *("conv1d.padding", "conv2d.padding", "conv3d.padding", "conv_tbc", "_convolution"),
    *("convolution", "cudnn_convolution", "cudnn_convolution_transpose"),
    *("mm", "mv", "bmm", "matmul", "einsum", "addmv", "addr", "addbmm", "baddbmm", "prelu"),
    *("chain_matmul", "linalg_multi_dot", "linalg_vecdot", "_addmm_activation"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_cudnn_rnn"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "mkldnn_rnn_layer"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention"),
    "_native_multi_head_attention",
)
"""Operators that autocast runs in half precision on some device, including those of heads.
https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference"""

REFUSED = ("binary_cross_entropy",)
"""Operators for which autocast on CUDA raises an error, because their input would be in half
precision."""


class Float32Operators:
    """Autocast kernels that run inaccurate operators and heads in float32.

    Args:
        device: the device type whose autocast is changed.
        on_failure: called with the exception if a replacement fails; torch's kernel is then used.

    Attributes:
        is_active: whether the replacements act; otherwise they call torch's kernels.
        remove: puts torch's kernels back.

    Raises:
        RuntimeError: this torch is too old to replace operators.
    """

    def __init__(self, device: str, on_failure: OnFailure) -> None:
        key = f"Autocast{device.upper()}"
        self.is_active = True
        self._autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        # By identity, because a weak reference would make ``torch.utils.swap_tensors`` fail. If a
        # later weight has the same identity, it only runs in higher precision than necessary.
        self._heads: set[tuple[int, torch.Size]] = set()
        functions = {name: self._make_operator(name, lambda args: True) for name in FLOAT32}
        functions |= {name: self._make_operator(name, self._is_head) for name in HEADS}
        self.remove = dispatch.override_operators(functions, key, on_failure=on_failure)

    def add_head(self, head: tuple[int, torch.Size]) -> None:
        """Run matmuls and convolutions with this weight in float32 from now on."""
        self._heads.add(head)

    def _make_operator(self, name: str, runs_in_float32: Callable[..., bool]) -> dispatch.Override:
        operator = operator_of(name)

        def replacement(
            torch_kernel: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> dispatch.DeferredCall | None:
            if not self.is_active or not runs_in_float32(args):
                return None
            is_matmul = name == "conv2d" and _kernel_covers_images(*args, **kwargs)
            function = _convolve_as_matmul if is_matmul else operator
            return dispatch.DeferredCall(self._run_without_autocast, (function, args, kwargs))

        return replacement

    def _run_without_autocast(
        self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(self._autocast_key):
            return operator(*map(_to_float32, args), **kwargs)

    def _is_head(self, args: tuple[Any, ...]) -> bool:
        """Whether a matmul or convolution with these arguments is a head."""
        weight = weight_of(args)
        return weight is not None and (id(weight), weight.shape) in self._heads


class RoundedOperators:
    """Autocast kernels that cast their inputs to half precision and return float32.

    They act only under ``torch.autocast(..., cache_enabled=False)``. Activation checkpoints restore
    this flag together with the rest of autocast's state, so a recomputation uses the same kernels.
    They are slower than torch's, because results are stored twice and in float32.

    Args:
        device: the device type whose autocast is changed.
        on_failure: called with the exception if a replacement fails; torch's kernel is then used.

    Attributes:
        is_active: whether the replacements act; otherwise they call torch's kernels.
        remove: puts torch's kernels back.

    Raises:
        RefusedError: this torch is too old to replace operators.
    """

    def __init__(self, device: str, on_failure: OnFailure) -> None:
        if not hasattr(torch.library, "get_kernel"):
            raise RefusedError(f"torch {torch.__version__} has no torch.library.get_kernel")
        key = f"Autocast{device.upper()}"
        self.is_active = True
        self._autocast_key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        names = (n for n in (*LOWERED, *REFUSED) if has_kernel(f"aten::{n}", key))
        functions = {name: self._make_operator(name) for name in names}
        self.remove = dispatch.override_operators(functions, key, on_failure=on_failure)

    def _make_operator(self, name: str) -> dispatch.Override:
        operator = operator_of(name)

        def replacement(
            torch_kernel: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> dispatch.DeferredCall | None:
            if not self.is_active or torch.is_autocast_cache_enabled():
                return None
            given = list(tensors_in((args, kwargs)))
            if name in REFUSED or any(tensor.layout is not torch.strided for tensor in given):
                return dispatch.DeferredCall(self._run_without_autocast, (operator, args, kwargs))
            if not any(tensor.dtype is torch.float32 for tensor in given):
                return None  # the program uses half precision itself
            return dispatch.DeferredCall(_return_float32, (torch_kernel, args, kwargs))

        return replacement

    def _run_without_autocast(
        self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(self._autocast_key):
            return operator(*args, **kwargs)


def _return_float32(
    operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return map_tensors(_to_float32, operator(*args, **kwargs))


def operator_of(name: str) -> Callable[..., Any]:
    """The operator with a name such as ``pow.Tensor_Scalar``, without ``aten::``."""
    packet, _, overload = name.partition(".")
    operator: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return operator


def _kernel_covers_images(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether the kernel is as large as the images, so that the output has one pixel."""
    return (
        images.dim() == 4
        and images.is_contiguous()
        and images.shape[1:] == weight.shape[1:]
        and padding in (0, [0], (0,), [0, 0], (0, 0))
        and dilation in (1, [1], (1,), [1, 1], (1, 1))
    )


def _convolve_as_matmul(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *rest: Any
) -> torch.Tensor:
    """Compute such a convolution as a matmul, whose backward pass takes a sixth of the time."""
    return functional.linear(images.flatten(1), weight.flatten(1), bias)[:, :, None, None]


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value
