"""What loses too much in half precision, kept in float32 under autocast.

``torch.autocast`` knows such operators on CUDA (its float32 list), few on the CPU, and on neither
the sigmoid: in bfloat16 it is exactly 1 from 6.2 on, and ``log(1 - p)`` of ``BCELoss`` is cut off
there. The kernels registered here for the autocast dispatch key fill that gap. The last matrix
product or convolution of each module (the head, whose outputs go into the loss) is kept in float32
as well, unless it ends in a hyperbolic tangent: then it makes data, such as images.
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
"""The float32 list of autocast on CUDA, as far as it matters in training, and what it lacks: the
sigmoids and the norms. https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference

Not batch norm: its kernels take means and variances in float32 whatever its input, and its output,
rounded once, goes into a product that would round it."""

PRODUCTS = (
    *("linear", "conv1d", "conv2d", "conv3d", "addmm"),
    *("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"),
)
"""Operators that a head may be, with their weight as the second or third argument."""

LOWERED = (
    *PRODUCTS,
    *("conv1d.padding", "conv2d.padding", "conv3d.padding", "conv_tbc", "_convolution"),
    *("convolution", "cudnn_convolution", "cudnn_convolution_transpose"),
    *("mm", "mv", "bmm", "matmul", "einsum", "addmv", "addr", "addbmm", "baddbmm", "prelu"),
    *("chain_matmul", "linalg_multi_dot", "linalg_vecdot", "_addmm_activation"),
    *("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_cudnn_rnn"),
    *("_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "mkldnn_rnn_layer"),
    *("scaled_dot_product_attention", "_scaled_dot_product_flash_attention"),
    "_native_multi_head_attention",
)
"""Operators that autocast runs in half precision on some device, those of heads among them.
https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference"""

REFUSED = ("binary_cross_entropy",)
"""Operators that autocast refuses on CUDA, as their input would be in half precision."""


class Float32Operators:
    """Kernels for the autocast key of a device type.

    Args:
        device: the device type.
        on_failure: told when one of them has failed; torch's own has done it then.

    Attributes:
        is_wanted: whether they shall act; otherwise they do what torch does.
        remove: puts torch's own kernels back.

    Raises:
        RuntimeError: this torch cannot hand over the kernels to be replaced.
    """

    def __init__(self, device: str, on_failure: OnFailure) -> None:
        key = f"Autocast{device.upper()}"
        self.is_wanted = True
        self._excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        # By identity: a weak reference would keep torch from exchanging a weight
        # (``torch.utils.swap_tensors``), and a later weight that is taken for one loses nothing.
        self._heads: set[tuple[int, torch.Size]] = set()
        functions = {name: self._function(name, lambda args: True) for name in FLOAT32}
        functions |= {name: self._function(name, self._is_of_head) for name in PRODUCTS}
        self.remove = dispatch.override_operators(functions, key, on_failure=on_failure)

    def keep(self, head: tuple[int, torch.Size]) -> None:
        """Compute the products with this weight in float32 from now on."""
        self._heads.add(head)

    def _function(self, name: str, is_kept: Callable[..., bool]) -> dispatch.Override:
        operator = operator_of(name)

        def function(
            below: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> dispatch.DeferredCall | None:
            if not self.is_wanted or not is_kept(args):
                return None
            covers_all = name == "conv2d" and _covers_all(*args, **kwargs)
            wanted = _one_product if covers_all else operator
            return dispatch.DeferredCall(self._past_autocast, (wanted, args, kwargs))

        return function

    def _past_autocast(
        self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(self._excluded):
            return operator(*map(_widened, args), **kwargs)

    def _is_of_head(self, args: tuple[Any, ...]) -> bool:
        """Whether a product is one of a head; autocast may have the others."""
        weight = weight_of(args)
        return weight is not None and (id(weight), weight.shape) in self._heads


class RoundedOperators:
    """Autocast whose operators round what they are given, and return float32.

    It takes the place of torch's own under ``torch.autocast(..., cache_enabled=False)``: what
    recomputes a part of a forward pass restores that state with the rest of autocast's, and so
    finds the same operators. It is slower than torch's own, as results are stored twice and wider.

    Args:
        device: the device type.
        on_failure: told when one of them has failed; torch's own has done it then.

    Attributes:
        is_wanted: whether they shall act; otherwise they do what torch does.
        remove: puts torch's own kernels back.

    Raises:
        RefusedError: this torch cannot hand over the kernels to be replaced.
    """

    def __init__(self, device: str, on_failure: OnFailure) -> None:
        if not hasattr(torch.library, "get_kernel"):
            raise RefusedError(f"torch {torch.__version__} cannot hand its kernels over")
        key = f"Autocast{device.upper()}"
        self.is_wanted = True
        self._excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        there = (n for n in (*LOWERED, *REFUSED) if has_kernel(f"aten::{n}", key))
        functions = {name: self._function(name) for name in there}
        self.remove = dispatch.override_operators(functions, key, on_failure=on_failure)

    def _function(self, name: str) -> dispatch.Override:
        operator = operator_of(name)

        def function(
            below: Callable[..., Any], *args: Any, **kwargs: Any
        ) -> dispatch.DeferredCall | None:
            if not self.is_wanted or torch.is_autocast_cache_enabled():
                return None
            given = list(tensors_in((args, kwargs)))
            if name in REFUSED or any(tensor.layout is not torch.strided for tensor in given):
                return dispatch.DeferredCall(self._past_autocast, (operator, args, kwargs))
            if not any(tensor.dtype is torch.float32 for tensor in given):
                return None  # the program's own half precision
            return dispatch.DeferredCall(_with_float32, (below, args, kwargs))

        return function

    def _past_autocast(
        self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(self._excluded):
            return operator(*args, **kwargs)


def _with_float32(
    operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    return map_tensors(_widened, operator(*args, **kwargs))


def operator_of(name: str) -> Callable[..., Any]:
    """The operator of a name without ``aten::``."""
    packet, _, overload = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


def _covers_all(
    images: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> bool:
    """Whether a convolution's kernel is as large as its images, in rows, and meets them once."""
    return (
        images.dim() == 4
        and images.is_contiguous()
        and images.shape[1:] == weight.shape[1:]
        and padding in (0, [0], (0,), [0, 0], (0, 0))
        and dilation in (1, [1], (1,), [1, 1], (1, 1))
    )


def _one_product(
    images: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *rest: Any
) -> torch.Tensor:
    """Such a convolution as a matrix product, whose backward pass takes a sixth of the time."""
    return functional.linear(images.flatten(1), weight.flatten(1), bias)[:, :, None, None]


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value
