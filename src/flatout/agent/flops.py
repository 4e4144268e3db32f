"""Counting the floating point operations of a step, by dtype.

The formulas are those of ``torch.utils.flop_counter``, and those in ``_FORMULAS`` for operators
that torch counts as zero or wrongly. A multiplication and an addition count as two operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
Formula = Callable[..., int]


def _count_sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape))


def _count_sdpa_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Count two matmuls for each matmul of the forward pass. Torch's formula also counts the
    recomputation of the scores, which is not part of the model."""
    return 2 * _count_sdpa(query, key, value)


def _count_rnn_layer(
    sequence: Any, input_weight: Any, hidden_weight: Any, *_: Any, **__: Any
) -> int:
    """Count one layer in one direction: each time step multiplies its input and its state by the
    weights of all gates. The shape of ``sequence`` is (time, batch, features)."""
    weights = int(input_weight.numel()) + int(hidden_weight.numel())
    return 2 * int(sequence.shape[0]) * int(sequence.shape[1]) * weights


def _count_rnn_layer_backward(*args: Any, **kwargs: Any) -> int:
    """Count the gradients of the inputs and of the weights, with as many matmuls each as the
    forward pass."""
    return 2 * _count_rnn_layer(*args, **kwargs)


def _count_linear(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Count a linear layer. The shape of ``weight`` is (outputs, inputs), even if oneDNN has packed
    it."""
    return 2 * int(x.numel()) * int(weight.shape[0])


def _count_matrix_vector(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * int(matrix.numel())


def _count_added_matrix_vector(_: Any, matrix: Any, *__: Any, **___: Any) -> int:
    return 2 * int(matrix.numel())


def _count_encoder_layer(source: Any, width: int, _: int, *args: Any, **__: Any) -> int:
    """Count the fast path of ``nn.TransformerEncoderLayer``. The shape of ``source`` is (batch,
    time, features)."""
    weights = sum(int(args[index].numel()) for index in (0, 2, 11, 13))
    return 2 * (int(source.numel()) // width * weights + _count_pairs(source))


def _count_self_attention(query: Any, key: Any, _: Any, width: int, *args: Any, **__: Any) -> int:
    """Count the fast path of ``nn.MultiheadAttention``. The shape of ``query`` is (batch, time,
    features)."""
    if query.shape != key.shape:
        raise ValueError("query and key differ in shape: cross-attention")
    weights = int(args[1].numel()) + int(args[3].numel())
    return 2 * (int(query.numel()) // width * weights + _count_pairs(query))


def _count_pairs(tokens: Any) -> int:
    """Count the multiplications for the scores, and for the products of scores and values."""
    return 2 * int(tokens.numel()) * int(tokens.shape[1])


_FORMULAS: dict[str, Formula] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _count_sdpa,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _count_sdpa_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _count_sdpa_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _count_sdpa_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _count_sdpa_backward,
    "aten::_transformer_encoder_layer_fwd": _count_encoder_layer,
    "aten::_native_multi_head_attention": _count_self_attention,
    "aten::mkldnn_rnn_layer": _count_rnn_layer,
    "aten::mkldnn_rnn_layer_backward": _count_rnn_layer_backward,
    "aten::mkldnn_linear": _count_linear,
    "mkldnn::_linear_pointwise": _count_linear,
    "mkl::_mkl_linear": _count_linear,
    "aten::mv": _count_matrix_vector,
    "aten::dot": _count_matrix_vector,
    "aten::vdot": _count_matrix_vector,
    "aten::addmv": _count_added_matrix_vector,
}


class FlopCounter(TorchDispatchMode):
    """Counts the floating-point operations of the operators that are called in this mode.

    Attributes:
        flops_by_dtype: a map from the name of a dtype to the operations of the operators whose
            first tensor has that dtype.
        counted: a map from the name of an operator in the profiler to the number of its calls, for
            operators that have a formula.
        uncountable: a map from the name of an operator to the error of its formula.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.flops_by_dtype: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        self.uncountable: dict[str, str] = {}

    def restart(self) -> None:
        """Reset the counts."""
        self.flops_by_dtype.clear()
        self.counted.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        if packet is None:  # a higher-order operator; its inner operators are counted separately
            return func(*args, **kwargs)
        name = str(packet).replace(".", "::", 1)
        from_torch = flop_counter.flop_registry.get(packet)
        if from_torch is None and name not in _FORMULAS:
            if func is not torch.ops.prim.device.default:
                with self:  # in inference mode, composite operators arrive undecomposed
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        try:
            if name in _FORMULAS or from_torch is None:
                flops = _FORMULAS[name](*args, **kwargs)
            else:
                flops = int(from_torch(*args, **kwargs, out_val=out))
            dtype = next(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
        except Exception as error:  # noqa: BLE001 - recorded in `uncountable`
            self.uncountable[name] = f"{type(error).__name__}: {error}"
            return out
        self.flops_by_dtype[dtype.removeprefix("torch.")] += flops
        self.counted[name] += 1
        return out
