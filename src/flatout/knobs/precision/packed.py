"""Linear layers of inference: weights kept in bfloat16, in the order that products want them in.

Autocast casts a weight in each call of the model, and oneDNN brings it into its own order in each
product. Both are kept here until the weight has changed. No counter of torch tells that for
certain (what is written through ``weight.data`` leaves none behind), so its memory is looked at
each time, which takes less than the cast.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from flatout import kernels
from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure

FEWEST_ROWS = 32
"""Of the input; a product with fewer reads its weight once, and looking at it does so again."""

SERIAL_BELOW = 1 << 17
"""Bytes below which one thread looks at them: waking the others takes as long."""

MOST_CHANGES = 8
"""A weight that has changed more often is left to torch."""

DTYPES = (torch.float32, torch.bfloat16)


class State(NamedTuple):
    """What decides a packed weight; two of the same state are packed to the same."""

    shape: torch.Size
    dtype: torch.dtype
    fingerprint: int


class Packed(NamedTuple):
    """A weight as it was.

    Attributes:
        state: of the weight.
        storage: tells whether the weight's memory is there still. A weak reference to the weight
            itself would keep torch from exchanging it (``torch.utils.swap_tensors``).
        weight: in bfloat16, in oneDNN's order; ``None``: it is left to torch.
        changes: how often it has changed so far.
    """

    state: State
    storage: StorageWeakRef
    weight: torch.Tensor | None
    changes: int


class PackedLinear:
    """Stands in for ``linear`` under autocast to bfloat16 on the CPU, where no graph is recorded.

    Args:
        on_failure: told when packing has failed; torch's own way is gone then and from there on.

    Raises:
        KernelError: ``kernels/fingerprint.c`` cannot be built.
    """

    def __init__(self, on_failure: OnFailure) -> None:
        self._fingerprint = kernels.load("fingerprint").fingerprint
        self._fingerprint.restype = ctypes.c_uint64
        self._fingerprint.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        self._failed = on_failure
        self._has_failed = False
        self._packed: dict[int, Packed] = {}  # by the identity of the weight
        self._undo = dispatch.override_operators(
            {"linear": self._linear}, "AutocastCPU", on_failure=self._leave_to_torch
        )

    def remove(self) -> None:
        """Put torch's own back, and let go of the weights."""
        self._undo()
        self._packed.clear()

    def _leave_to_torch(self, error: Exception) -> None:
        self._has_failed = True
        self._failed(error)

    def _linear(
        self,
        below: Callable[..., torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        if self._has_failed or not _can_take(x, weight, bias):
            return None
        packed = self._pack(weight, x.numel() // x.shape[-1])
        return None if packed is None else _product(x, packed, bias)

    def _pack(self, weight: torch.Tensor, rows: int) -> torch.Tensor | None:
        """The weight as it is now, packed; ``None``: it changes all the time."""
        known = self._packed.get(id(weight))
        if known is not None and known.weight is None:
            return None
        size = weight.numel() * weight.element_size()
        threads = torch.get_num_threads() if size >= SERIAL_BELOW else 1
        fingerprint = self._fingerprint(weight.data_ptr(), size, threads)
        state = State(weight.shape, weight.dtype, fingerprint)
        if known is not None and known.state == state:
            return known.weight
        self._packed = {k: p for k, p in self._packed.items() if not p.storage.expired()}
        changes = 0 if known is None else known.changes + 1
        packed = None
        if changes <= MOST_CHANGES:
            in_bf16 = weight.detach().to(torch.bfloat16)
            packed = torch.ops.mkldnn._reorder_linear_weight(in_bf16, rows)
        storage = StorageWeakRef(weight.untyped_storage())
        self._packed[id(weight)] = Packed(state, storage, packed, changes)
        return packed


def is_available() -> bool:
    """Whether torch multiplies bfloat16 by oneDNN here, and can hand its own kernel over."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and hasattr(torch.library, "get_kernel")
    )


def _can_take(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        # What records or counts operators shall find torch's own, and no weights that are apart.
        torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_grad_enabled()
        and type(weight) is torch.nn.Parameter
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and torch._C._get_mkldnn_enabled()
        and dispatch.are_plain(*tensors)
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.is_contiguous()
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    in_bf16 = None if bias is None else bias.to(torch.bfloat16)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.to(torch.bfloat16), packed, in_bf16, "none", [], ""
    )
    return product
