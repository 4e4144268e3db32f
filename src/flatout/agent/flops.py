"""Counting the floating point operations of a step, by dtype.

Torch's own formulas (``torch.utils.flop_counter``), and those for operators it counts as zero. A
multiply and an add are two operations.
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


def _sdpa(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape))


def _sdpa_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    shapes = (grad.shape, query.shape, key.shape, value.shape)
    return int(flop_counter.sdpa_backward_flop_count(*shapes))


def _rnn_layer(sequence: Any, input_weight: Any, hidden_weight: Any, *_: Any, **__: Any) -> int:
    """One layer, one direction: each time step multiplies its input and its state with all gates'
    weights. ``sequence`` is (time, batch, features)."""
    weights = int(input_weight.numel()) + int(hidden_weight.numel())
    return 2 * int(sequence.shape[0]) * int(sequence.shape[1]) * weights


def _rnn_layer_backward(*args: Any, **kwargs: Any) -> int:
    """Gradients of inputs and of weights: as many products each as the forward pass."""
    return 2 * _rnn_layer(*args, **kwargs)


def _matrix_vector(matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * int(matrix.numel())


def _added_matrix_vector(_: Any, matrix: Any, *__: Any, **___: Any) -> int:
    return 2 * int(matrix.numel())


def formulas() -> dict[Any, Formula]:
    """Formula by operator; each is called with the operator's arguments."""
    own: dict[str, Formula] = {
        "_scaled_dot_product_flash_attention_for_cpu": _sdpa,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _sdpa_backward,
        "mkldnn_rnn_layer": _rnn_layer,
        "mkldnn_rnn_layer_backward": _rnn_layer_backward,
        "mv": _matrix_vector,
        "dot": _matrix_vector,
        "addmv": _added_matrix_vector,
    }
    known = {packet: _from_torch(formula) for packet, formula in flop_counter.flop_registry.items()}
    for name, formula in own.items():
        if hasattr(aten, name):
            known.setdefault(getattr(aten, name), formula)
    return known


def _from_torch(formula: Formula) -> Formula:
    def count(*args: Any, out: Any, **kwargs: Any) -> int:
        return int(formula(*args, **kwargs, out_val=out))

    count.wants_out = True  # type: ignore[attr-defined]
    return count


class FlopCounter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        flops_by_dtype: operations by the name of the dtype of the operator's first tensor.
        counted: names, as the profiler gives them, of the operators that had a formula.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops_by_dtype: Counter[str] = Counter()
        self.counted: set[str] = set()
        self._formulas = formulas()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = getattr(func, "_overloadpacket", None)
        formula = self._formulas.get(packet)
        if formula is None:
            if hasattr(func, "decompose"):  # composite operators reach us in inference mode
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        dtype = next(str(a.dtype) for a in args if isinstance(a, torch.Tensor))
        extra = {"out": out} if hasattr(formula, "wants_out") else {}
        self.flops_by_dtype[dtype.removeprefix("torch.")] += formula(*args, **kwargs, **extra)
        self.counted.add(str(packet).replace(".", "::"))
        return out
