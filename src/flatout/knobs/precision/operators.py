"""What loses too much in half precision, kept in float32 under autocast.

``torch.autocast`` knows such operators on CUDA (its float32 list), few on the CPU, and on neither
the sigmoid: in bfloat16 it is exactly 1 from 6.2 on, and ``log(1 - p)`` of ``BCELoss`` is cut off
there. The kernels registered here for the autocast dispatch key fill that gap. The last matrix
product or convolution of each module (the head, whose outputs go into the loss) is kept in float32
as well, unless it ends in a hyperbolic tangent: then it makes data, such as images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flatout.agent import dispatch
from flatout.agent.containment import Failed

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

_PRODUCT_FUNCTIONS = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(torch.addmm, torch.Tensor.addmm),
}

_TANH_FUNCTIONS = {torch.tanh, torch.tanh_, torch.Tensor.tanh, torch.Tensor.tanh_, functional.tanh}

HALVES = (torch.bfloat16, torch.float16)


class Float32Operators:
    """Kernels for the autocast key of a device type.

    Args:
        device: the device type.
        failed: told when one of them has failed; torch's own has done it then.

    Attributes:
        is_wanted: whether they shall act; otherwise they do what torch does.
        remove: puts torch's own kernels back.

    Raises:
        RuntimeError: this torch cannot hand over the kernels to be replaced.
    """

    def __init__(self, device: str, failed: Failed) -> None:
        key = f"Autocast{device.upper()}"
        self.is_wanted = True
        self._excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
        # By identity: a weak reference would keep torch from exchanging a weight
        # (``torch.utils.swap_tensors``), and a later weight that is taken for one loses nothing.
        self._heads: set[tuple[int, torch.Size]] = set()
        functions = {name: self._function(name, lambda args: True) for name in FLOAT32}
        functions |= {name: self._function(name, self._is_of_head) for name in PRODUCTS}
        self.remove = dispatch.layer(functions, key, failed=failed)

    @contextlib.contextmanager
    def finding_head(self) -> Iterator[Products]:
        """The last product in here with a parameter is a head from now on, unless the ``output``
        that is noted there is a hyperbolic tangent."""
        with Products() as products:
            yield products
        if products.weight is not None and not products.makes_data:
            self._heads.add((id(products.weight), products.weight.shape))

    def _function(self, name: str, is_kept: Callable[..., bool]) -> dispatch.Function:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")

        def function(below: Callable[..., Any], *args: Any, **kwargs: Any) -> dispatch.Call | None:
            if not self.is_wanted or not is_kept(args):
                return None
            covers_all = name == "conv2d" and _covers_all(*args, **kwargs)
            wanted = _one_product if covers_all else operator
            return dispatch.Call(self._past_autocast, (wanted, args, kwargs))

        return function

    def _past_autocast(
        self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(self._excluded):
            return operator(*map(_widened, args), **kwargs)

    def _is_of_head(self, args: tuple[Any, ...]) -> bool:
        """Whether a product is one of a head; autocast may have the others."""
        weight = _weight(args)
        return weight is not None and (id(weight), weight.shape) in self._heads


class Products(TorchFunctionMode):
    """Sees matrix products, convolutions and hyperbolic tangents.

    Attributes:
        weight: of the last one with a parameter.
        tangent: the last hyperbolic tangent.
        output: of the module.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight: torch.nn.Parameter | None = None
        self.tangent: object = None
        self.output: object = None

    @property
    def makes_data(self) -> bool:
        """Whether the module returns a hyperbolic tangent."""
        return self.tangent is not None and self.output is self.tangent

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in _PRODUCT_FUNCTIONS:
            weight = _weight((*args, *(kwargs or {}).values()))
            self.weight = self.weight if weight is None else weight
        result = function(*args, **(kwargs or {}))
        if function in _TANH_FUNCTIONS:
            self.tangent = result
        return result


def _weight(args: tuple[Any, ...]) -> torch.nn.Parameter | None:
    return next((a for a in args[1:3] if isinstance(a, torch.nn.Parameter)), None)


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
