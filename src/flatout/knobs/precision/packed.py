"""Keep the weights of linear layers packed for bfloat16 matmuls in inference.

Without this, autocast casts a weight in each call of the model, and oneDNN reorders it in each
matmul. The packed weight is kept here until the weight changes. Torch's version counters do not
show every change (writing through ``weight.data`` increments none), so a fingerprint of the
weight's memory is computed before each use, which takes less time than the cast.
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
"""With fewer rows of input, a matmul is bound by reading its weight once, and the fingerprint reads
it once as well; it is left to torch."""

SERIAL_BELOW = 1 << 17
"""Fingerprints of fewer bytes are computed on one thread: waking the others takes as long."""

MOST_CHANGES = 8
"""A weight that has changed more often than this is left to torch."""

DTYPES = (torch.float32, torch.bfloat16)


class State(NamedTuple):
    """What a packed weight depends on; two weights with equal states have the same packed form."""

    shape: torch.Size
    dtype: torch.dtype
    fingerprint: int


class Packed(NamedTuple):
    """A packed weight.

    Attributes:
        state: the state of the weight when it was packed.
        storage: tells whether the weight's memory still exists. A weak reference to the weight
            itself would make ``torch.utils.swap_tensors`` fail.
        weight: the packed weight, in bfloat16 and oneDNN's order; ``None``: it is left to torch.
        changes: how often the weight has changed so far.
    """

    state: State
    storage: StorageWeakRef
    weight: torch.Tensor | None
    changes: int


class PackedLinear:
    """Replaces ``linear`` under autocast to bfloat16 on the CPU, where no graph is recorded.

    Args:
        on_failure: called with the exception if packing fails; torch's kernel is used from then on.

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
        """Put torch's kernel back, and release the packed weights."""
        self._undo()
        self._packed.clear()

    def _leave_to_torch(self, error: Exception) -> None:
        self._has_failed = True
        self._failed(error)

    def _linear(
        self,
        torch_kernel: Callable[..., torch.Tensor],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        if self._has_failed or not _is_supported(x, weight, bias):
            return None
        packed = self._pack(weight, x.numel() // x.shape[-1])
        return None if packed is None else _packed_linear(x, packed, bias)

    def _pack(self, weight: torch.Tensor, rows: int) -> torch.Tensor | None:
        """The packed form of a weight as it is now; ``None`` if it changes too often.

        Args:
            weight: outputs x inputs.
            rows: the number of rows of the input, for which oneDNN chooses its order.
        """
        present = self._packed.get(id(weight))
        if present is not None and present.weight is None:
            return None
        size = weight.numel() * weight.element_size()
        threads = torch.get_num_threads() if size >= SERIAL_BELOW else 1
        fingerprint = self._fingerprint(weight.data_ptr(), size, threads)
        state = State(weight.shape, weight.dtype, fingerprint)
        if present is not None and present.state == state:
            return present.weight
        self._packed = {k: p for k, p in self._packed.items() if not p.storage.expired()}
        changes = 0 if present is None else present.changes + 1
        packed = None
        if changes <= MOST_CHANGES:
            in_bf16 = weight.detach().to(torch.bfloat16)
            packed = torch.ops.mkldnn._reorder_linear_weight(in_bf16, rows)
        storage = StorageWeakRef(weight.untyped_storage())
        self._packed[id(weight)] = Packed(state, storage, packed, changes)
        return packed


def is_available() -> bool:
    """Whether oneDNN computes bfloat16 matmuls here, and this torch can replace operators."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and hasattr(torch.library, "get_kernel")
    )


def _is_supported(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        # Tracing and dispatch modes must see torch's operators and the program's weights.
        torch._C._get_tracing_state() is None
        and not torch._C._len_torch_dispatch_stack()
        and not torch.is_grad_enabled()
        and type(weight) is torch.nn.Parameter
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and torch._C._get_mkldnn_enabled()
        and dispatch.may_use_kernel(*tensors)
        and all(tensor.dtype in DTYPES for tensor in tensors)
        and weight.dim() == 2
        and weight.numel() > 0
        and weight.is_contiguous()
        and x.dim() >= 2
        and x.shape[-1] == weight.shape[1]
        and x.numel() >= FEWEST_ROWS * x.shape[-1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _packed_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    bf16_bias = None if bias is None else bias.to(torch.bfloat16)
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.to(torch.bfloat16), packed, bf16_bias, "none", [], ""
    )
    return output
