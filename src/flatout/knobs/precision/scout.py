"""Find out from a pass without autocast which tensors of it the program itself can see.

Under autocast, the results of matmuls and convolutions, and what is computed from them, are in half
precision. This is harmless as long as they are passed from operator to operator, but it changes the
program where something else sees them: an attribute or a list in which the program keeps them, a
hook, a custom ``autograd.Function``, ``numpy()``, or an operator without a kernel for half
precision.
"""

from __future__ import annotations

import gc
import sys
import sysconfig
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flatout.intercept import objects
from flatout.intercept.containment import OnFailure, OriginalCall, attempt
from flatout.intercept.nested import tensors_in

HALVES = (torch.bfloat16, torch.float16)

_HEAD_FUNCTIONS = {
    *(functional.linear, functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(torch.addmm, torch.Tensor.addmm),
}

_TANH_FUNCTIONS = {torch.tanh, torch.tanh_, torch.Tensor.tanh, torch.Tensor.tanh_, functional.tanh}

_LOWERED = frozenset(
    (
        *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"),
        *("conv_transpose3d", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm"),
        *("addbmm", "baddbmm", "mv", "addmv", "einsum", "bilinear"),
        *("scaled_dot_product_attention", "multi_head_attention_forward", "lstm", "gru"),
        *("rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        *("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
    )
)
"""Functions whose results are in half precision under autocast, and whose arguments may be in any
precision."""

_PASSED_ON = frozenset(
    (
        # arithmetic and comparisons, which promote their arguments
        *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "true_divide", "neg"),
        *("__radd__", "__rsub__", "__rmul__", "__rtruediv__", "__rdiv__", "__rpow__", "pow"),
        *("square", "sqrt", "rsqrt", "reciprocal", "abs", "exp", "log", "log1p", "sin", "cos"),
        *("maximum", "minimum", "clamp", "clamp_", "clamp_min", "where", "masked_fill"),
        *("masked_fill_", "eq", "ne", "gt", "ge", "lt", "le", "__eq__", "__ne__", "__lt__"),
        *("__gt__", "__ge__", "__le__", "isfinite", "isnan", "isinf", "logical_not", "sign"),
        # reductions
        *("sum", "mean", "var", "std", "amax", "amin", "max", "min", "argmax", "argmin", "norm"),
        *("logsumexp", "all", "any", "topk", "sort", "argsort"),
        # views and shapes, which read no element
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "t"),
        *("permute", "movedim", "contiguous", "expand", "expand_as", "view_as", "reshape_as"),
        *("chunk", "split", "unbind", "__getitem__", "select", "narrow", "index_select", "repeat"),
        *("repeat_interleave", "flip", "roll", "tril", "triu", "cat", "concat", "concatenate"),
        *("stack", "size", "dim", "numel", "stride", "__len__", "is_contiguous"),
        *("is_floating_point", "is_complex", "ndimension", "swapaxes", "swapdims", "adjoint"),
        *("broadcast_to", "unfold", "gather", "pixel_shuffle"),
        # attributes that do not depend on the precision
        *("shape", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_mps", "is_xpu"),
        *("is_sparse", "is_nested", "is_quantized", "is_leaf", "layout", "T", "mT", "data"),
        *("_version", "is_meta"),
        # values of single elements
        *("item", "tolist", "__bool__", "__float__", "__int__"),
        # casts and the like
        *("to", "float", "double", "type_as", "detach", "clone", "zeros_like", "ones_like"),
        *("empty_like", "rand_like", "randn_like", "full_like", "new_zeros", "new_ones"),
        *("new_empty", "new_full", "bernoulli"),
        # layers
        *("relu", "relu_", "gelu", "silu", "silu_", "elu", "elu_", "leaky_relu", "leaky_relu_"),
        *("hardtanh", "hardtanh_", "hardswish", "hardsigmoid", "mish", "selu", "celu", "softplus"),
        *("tanh", "tanh_", "sigmoid", "sigmoid_", "logsigmoid", "softmax", "log_softmax"),
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"),
        *("layer_norm", "group_norm", "instance_norm", "batch_norm", "rms_norm", "normalize"),
        *("embedding", "relu6", "glu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d"),
        *("avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"),
        *("pad", "interpolate"),
        # losses, and weights from others
        *("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss"),
        *("binary_cross_entropy_with_logits", "_weight_norm"),
        # fast paths of torch in evaluation, which it does not use under autocast
        *("_nested_tensor_from_mask_left_aligned", "_nested_tensor_from_mask", "to_padded_tensor"),
    )
)
"""Functions that have kernels for half precision, promote their arguments, and return half
precision if their arguments are. Functions in neither list are assumed to see a difference."""

MOST_BY_SCAN = 24
"""For up to this many tensors, ``gc.get_referrers`` is used; it compares each reference with each
of the tensors, which takes too long for more."""


class Scout(TorchFunctionMode):
    """Follows the tensors of a pass that would be in half precision under autocast.

    Args:
        given: the arguments of the module.
        on_failure: called with the exception if following the tensors fails.

    Attributes:
        why: what would see such a tensor; ``None`` if nothing has so far.
        weight: the weight of the last matmul or convolution with a parameter.
    """

    def __init__(self, given: Any, on_failure: OnFailure) -> None:
        super().__init__()
        self._failed = on_failure
        self.why: str | None = None
        self.weight: torch.nn.Parameter | None = None
        self._seen = _Tensors()
        self._halves = _Tensors()
        self._last_tanh: weakref.ref[Any] | None = None
        self._nesting = _autocast_nesting()
        for tensor in tensors_in(given):
            self._seen.add(tensor)

    def returned_tanh(self, output: Any) -> bool:
        """Whether the output of the module is the result of its last hyperbolic tangent."""
        return self._last_tanh is not None and output is not None and self._last_tanh() is output

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        attempt(self._failed, self._follow, function, args, kwargs, result, sys._getframe(1))
        return result

    def _follow(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        caller: FrameType,
    ) -> None:
        if function in _HEAD_FUNCTIONS:
            weight = weight_of((*args, *kwargs.values()))
            self.weight = self.weight if weight is None else weight
        if function in _TANH_FUNCTIONS and isinstance(result, torch.Tensor):
            self._last_tanh = weakref.ref(result)
        if self.why is None:
            self.why = self._find_observer(function, args, kwargs, result, caller)

    def _find_observer(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        caller: FrameType,
    ) -> str | None:
        """Note which results would be in half precision; returns why this call would see one."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            name = getattr(function.__self__, "__name__", "")
        given = list(tensors_in((args, kwargs)))
        results = list(tensors_in(result))
        if any(t.grad_fn is not None and t not in self._seen for t in given):
            return "it uses a tensor that does not come from torch's operators"
        if any(tensor.dtype in HALVES for tensor in results):
            return "it uses half precision itself"
        if _autocast_nesting() != self._nesting:
            return "it turns autocast on or off itself"
        has_half_inputs = any(tensor in self._halves for tensor in given)
        if has_half_inputs:
            if name == "dtype":
                if not _is_installed(caller.f_code.co_filename):
                    return "it reads the dtype of a tensor"
            elif name not in _PASSED_ON and name not in _LOWERED:
                return f"{name or function} is not known to give the same result in half precision"
            elif isinstance(kwargs.get("out"), torch.Tensor):
                return f"{name} writes into a tensor of the program"
        is_sparse = any(t.layout is not torch.strided for t in given)
        if (has_half_inputs or name in _LOWERED) and is_sparse:
            return f"{name} of a sparse tensor may not work in half precision"
        returns_half = has_half_inputs
        if name not in _PASSED_ON:
            returns_half = any(tensor.dtype is torch.float32 for tensor in given)
        given_ids = {id(tensor) for tensor in given}
        for tensor in results:
            self._seen.add(tensor)
            if returns_half and tensor.dtype is torch.float32 and id(tensor) not in given_ids:
                self._halves.add(tensor)
        return None

    def find_kept(self, output: Any) -> str | None:
        """Why the program can still see such a tensor after the pass; ``None`` if it cannot.

        Tensors that the module has returned, and tensors that only autograd holds, do not count.

        Args:
            output: the output of the module, to which the calling frames of flatout refer, too.
        """
        halves = self._halves.living()
        if not halves:
            return None
        containers: list[Any] = []
        returned = {id(tensor): tensor for tensor in tensors_in(output, containers)}
        memory = [t.untyped_storage()._cdata for t in returned.values() if t in self._halves]
        if len(set(memory)) < len(memory):
            return "it returns tensors that share memory"
        expected = {id(local) for local in (halves, containers, returned)}
        for container in containers:
            expected |= {id(container), id(objects.attributes(container))}
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            expected.add(id(frame))
            frame = frame.f_back
        targets = (*halves, *containers)
        expected.add(id(targets))
        referrers = (r for r in _find_referrers(targets) if type(r) is not OriginalCall)
        if any(id(referrer) not in expected for referrer in referrers):
            return "the program keeps results of operators other than its output"
        return None


class _Tensors:
    """A set of tensors, compared by identity, that does not keep them alive."""

    def __init__(self) -> None:
        self._references: dict[int, weakref.ref[torch.Tensor]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        self._references[id(tensor)] = weakref.ref(tensor)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        reference = self._references.get(id(tensor))
        return reference is not None and reference() is tensor

    def living(self) -> list[torch.Tensor]:
        return [t for reference in self._references.values() if (t := reference()) is not None]


def weight_of(args: tuple[Any, ...]) -> torch.nn.Parameter | None:
    """The weight of a matmul or a convolution with these arguments, if it has one."""
    return next((a for a in args[1:3] if isinstance(a, torch.nn.Parameter)), None)


def _find_referrers(targets: tuple[Any, ...]) -> Iterator[Any]:
    """All objects that refer to one of the targets."""
    if len(targets) <= MOST_BY_SCAN:
        yield from gc.get_referrers(*targets)
        return
    identities = set(map(id, targets))
    for candidate in gc.get_objects():
        if not identities.isdisjoint(map(id, gc.get_referents(candidate))):
            yield candidate


def _autocast_nesting() -> int:
    """Return the number of autocasts that are entered.

    Torch returns this count only when one more is entered and left.
    """
    torch.autocast_increment_nesting()
    return int(torch.autocast_decrement_nesting())


def _is_installed(file: str) -> bool:
    """Whether a file belongs to a library; libraries are assumed to work under autocast."""
    return "-packages" in file or file.startswith(sysconfig.get_paths()["stdlib"])
