"""What the program computes, for a proof: early gradients, passes that do not train, the end.

Looks on and changes nothing: it draws no random numbers, records no graph, and runs outside of
autocast. Where backward raises, there is one more frame in the traceback.

Gradients are taken as the last backward call before an update leaves them, so that neither clipping
nor what a scaler does in between shows in them. A sample is every n-th element in the order of
the indices, whatever the strides, with n coprime to the number of elements, so that it does not
keep to one column.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
import traceback
from array import array
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.flows import Flows, is_sum_of_terms
from flatout.intercept import objects
from flatout.intercept.capture import is_capturing
from flatout.intercept.containment import attempt
from flatout.intercept.finite import stored_gradient
from flatout.intercept.modes import without_autocast
from flatout.intercept.nested import tensors_in

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.request import Inspection

_autograd: Any = torch.autograd

SAMPLE_BYTES = 4 * 2**20
"""Of all samples of gradients of a process."""

SAMPLE_ELEMENTS, LEAST_ELEMENTS = 2048, 16
"""Of one gradient or output; of a gradient for which fewer are left, only the norm is taken."""

TOP1_ROWS = 2048
OUTPUT_TENSORS = 4
OUTPUT_LIMIT = 2000
"""Passes forward after which no more are recorded."""

IDLE_BACKWARDS = 32
"""Backward calls for each of the gradients asked for, after which no more are waited for."""

CERTAIN_PASSES = 3
"""By then, outputs that are no probabilities have left the range from 0 to 1."""

ROOTS_LIMIT = 16
"""Modules kept until the end of the program; of a program that makes more, the first ones."""


@dataclass(frozen=True)
class _Taken:
    """A gradient as backward left it, still on its device."""

    norm: torch.Tensor
    elements: int
    sample: torch.Tensor | None


class Inspector:
    """Records what the request asks to see.

    A failure in here is recorded with its traceback and ends the inspection, not the program.

    Args:
        host: of this process; its knobs are turned already, since what comes later lies around
            them and sees what the program sees.
        inspection: what to record.
    """

    def __init__(self, host: Host, inspection: Inspection) -> None:
        self._host = host
        self._inspection = inspection
        self._roots: dict[int, tuple[str, Any]] = {}
        self._root_classes: Counter[str] = Counter()
        self._probabilities: dict[int, _Probabilities] = {}
        self._outputs = 0
        self._names: dict[int, tuple[str, torch.Tensor]] = {}
        self._homeless = 0
        self._updates: Counter[int] = Counter()
        self._taken: dict[int, _Taken] = {}
        self._sample_elements: int | None = None
        self._backward_depth = 0
        self._backwards = 0
        self._stepping: Any = None
        self._flows = Flows(self._contained)
        self._is_active = True
        host.forward_wrappers.append(self._forward)
        self._watches_gradients = inspection.gradient_steps > 0
        if self._watches_gradients:
            host.backward_wrappers.append(self._backward, self._has_failed)
            host.before_optimizer_step.append(self._step_begins)
            host.after_optimizer_step.append(self._step_ends)

    def close(self) -> None:
        """Record the state, if asked for, and stop."""
        if self._is_active and self._inspection.state:
            self._contained(self._write_state)
        self.stop()

    def stop(self) -> None:
        """Leave torch as it was, and let go of the modules."""
        if self._is_active:
            self._is_active = False
            self._host.forward_wrappers.remove(self._forward)
        self._stop_gradients()
        self._roots.clear()

    def _stop_gradients(self) -> None:
        if self._watches_gradients:
            self._watches_gradients = False
            self._host.backward_wrappers.remove(self._backward)
            self._host.before_optimizer_step.remove(self._step_begins)
            self._host.after_optimizer_step.remove(self._step_ends)
        self._names.clear()
        self._taken.clear()

    def _contained(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function`` returns, called without graph and autocast; ``None`` if it fails."""
        return attempt(self._has_failed, _looking_on, function, *args)

    def _has_failed(self, error: Exception) -> None:
        why = f"ended: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._host.events.add("failed", "inspection", why, trace)
        self.stop()

    # Gradients

    def _backward(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._backward_depth += 1
        accumulates = kwargs.get("accumulate_grad")
        if accumulates and self._watches_gradients:
            self._contained(self._flows.watch, args[0])
        try:
            result = own(*args, **kwargs)
        finally:
            self._backward_depth -= 1
            if self._backward_depth == 0:
                self._flows.leave()
        if self._backward_depth == 0 and accumulates and self._watches_gradients:
            self._contained(self._backward_ends)
        return result

    def _backward_ends(self) -> None:
        self._backwards += 1
        wanted = self._inspection.gradient_steps
        parameters = self._trainable()
        if self._backwards > IDLE_BACKWARDS * wanted or all(
            self._updates[id(p)] >= wanted for p in parameters
        ):
            self._stop_gradients()
            return
        self._take(parameters)
        if not self._host.hooks.optimizer_exists:
            self._write_gradients(parameters)
        elif self._stepping is not None:  # a closure: the update follows at once
            self._write_gradients(_members(self._stepping))
            self._stepping = None

    def _trainable(self) -> list[torch.Tensor]:
        """All parameters of optimizers and roots that may get a gradient."""
        found = [p for optimizer in self._host.optimizers for p in _members(optimizer)]
        found += [p for _, root in self._roots.values() for p in objects.parameters(root)]
        return list({id(p): p for p in found if p.requires_grad}.values())

    def _step_begins(self, optimizer: Any) -> None:
        self._contained(self._before_step, optimizer)

    def _before_step(self, optimizer: Any) -> None:
        members = _members(optimizer)
        if self._backward_depth:  # it steps while backward runs
            self._take(members)
        elif all(id(p) not in self._taken for p in members):
            self._stepping = optimizer
        self._write_gradients(members)

    def _step_ends(self, optimizer: Any) -> None:
        self._stepping = None

    def _take(self, parameters: Iterable[torch.Tensor]) -> None:
        """Take the gradients that are there, of those parameters of which more are wanted."""
        for parameter in parameters:
            grad = stored_gradient.__get__(parameter)
            if grad is None or self._updates[id(parameter)] >= self._inspection.gradient_steps:
                continue
            if self._sample_elements is None:
                self._sample_elements = self._affordable_elements()
            values = _values(grad)
            wanted = self._sample_elements >= LEAST_ELEMENTS and not grad.is_sparse
            self._taken[id(parameter)] = _Taken(
                torch.linalg.vector_norm(values, dtype=_exact_dtype(values)),
                values.numel(),
                _copied(_sampled(values, self._sample_elements)) if wanted else None,
            )

    def _affordable_elements(self) -> int:
        count = len(self._trainable())
        each = SAMPLE_BYTES // (4 * max(count, 1) * self._inspection.gradient_steps)
        if each < LEAST_ELEMENTS:
            why = f"of the gradients of {count} parameters only the norms are recorded"
            self._host.events.add("skipped", "inspection", why)
        return min(each, SAMPLE_ELEMENTS)

    def _write_gradients(self, members: Iterable[torch.Tensor]) -> None:
        """Record those that were taken of the parameters of one update."""
        entries = []
        for parameter in members:
            taken = self._taken.pop(id(parameter), None)
            if taken is None:
                continue
            self._updates[id(parameter)] += 1
            flow, is_sum = self._flows.take(parameter), is_sum_of_terms(parameter)
            entries.append(
                {
                    "name": self._parameter_name(parameter),
                    "norm": float(taken.norm),
                    "elements": taken.elements,
                    "sample": None if taken.sample is None else _base64(taken.sample),
                    "roundoff": None if flow is None else flow.roundoff,
                    "noise": float(flow.noise) if flow is not None and is_sum else None,
                }
            )
        if entries:
            self._host.record.write({"kind": "gradients", "parameters": entries})

    def _parameter_name(self, parameter: torch.Tensor) -> str:
        """Its name in the first root that has it, else its number among those in none."""
        names = self._names
        if id(parameter) not in names:
            known = {name for name, _ in names.values()}
            for root_name, root in self._roots.values():
                for name, member in objects.named_parameters(root):
                    full_name = f"{root_name}.{name}"
                    if id(member) not in names and full_name not in known:
                        names[id(member)] = (full_name, member)
        if id(parameter) not in names:
            self._homeless += 1
            names[id(parameter)] = (f"parameter {self._homeless} in no module", parameter)
        return names[id(parameter)][0]

    # Passes forward

    def _forward(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if id(module) not in self._roots and len(self._roots) < ROOTS_LIMIT:
            name = objects.class_name(module)
            self._root_classes[name] += 1
            count = self._root_classes[name]
            self._roots[id(module)] = (name if count == 1 else f"{name} {count}", module)
        if not self._wants_outputs(module):
            output = call(module, *args, **kwargs)
            if self._inspection.state and torch.is_grad_enabled() and id(module) in self._roots:
                self._contained(self._look_for_ones, module, output)
            return output
        is_detailed = self._outputs < self._inspection.outputs
        inputs = self._contained(_digest, tensors_in((args, kwargs))) if is_detailed else None
        output = call(module, *args, **kwargs)
        if self._is_active:
            self._contained(self._write_output, module, inputs, output, is_detailed)
        return output

    def _wants_outputs(self, module: Any) -> bool:
        if torch.is_grad_enabled() and objects.is_training(module):
            return False
        inspection = self._inspection
        if self._outputs >= inspection.outputs:
            trains = self._backwards > 0 or self._host.hooks.optimizer_exists
            if not inspection.state or not trains or self._outputs >= OUTPUT_LIMIT:
                return False
        return not is_capturing()

    def _write_output(self, module: Any, inputs: str | None, output: Any, detailed: bool) -> None:
        self._outputs += 1
        tensors = list(tensors_in(output))
        floating = [t for t in tensors if t.is_floating_point() and t.numel()]
        root = self._roots.get(id(module), (objects.class_name(module), module))[0]
        self._host.record.write(
            {
                "kind": "outputs",
                "root": root,
                "inputs": inputs,
                "digest": _digest(tensors) if detailed else None,
                "tensors": [_described(t, detailed) for t in floating[:OUTPUT_TENSORS]],
            }
        )

    def _look_for_ones(self, module: Any, output: Any) -> None:
        seen = self._probabilities.setdefault(id(module), _Probabilities())
        for tensor in tensors_in(output):
            if tensor.is_floating_point() and tensor.dim() and tensor.numel():
                seen.look(_local(tensor))
                return

    # The end

    def _write_state(self) -> None:
        nothing = _Probabilities()
        roots = [
            {**_state(name, root), **self._probabilities.get(identity, nothing).counts()}
            for identity, (name, root) in self._roots.items()
        ]
        self._host.record.write({"kind": "state", "roots": roots})


class _Probabilities:
    """Whether outputs are probabilities, and how many of them are exactly 1."""

    def __init__(self) -> None:
        self._elements = 0
        self._passes = 0
        self._ones: torch.Tensor | None = None
        self._outside: torch.Tensor | None = None
        self._is_over = False

    def look(self, values: torch.Tensor) -> None:
        """One more output; on an accelerator, only the first ones are waited for."""
        if self._is_over:
            return
        sample = _sampled(values, SAMPLE_ELEMENTS)
        outside = ((sample < 0) | (sample > 1)).any()
        ones = (sample == 1).sum()
        self._outside = outside if self._outside is None else self._outside | outside
        self._ones = ones if self._ones is None else self._ones + ones
        self._elements += sample.numel()
        self._passes += 1
        self._is_over = self._passes <= CERTAIN_PASSES and bool(self._outside)

    def counts(self) -> dict[str, int]:
        """Fields of ``record.RootState``."""
        if self._ones is None or self._outside is None or bool(self._outside):
            return {"probabilities": 0, "ones": 0}
        return {"probabilities": self._elements, "ones": int(self._ones)}


def _looking_on(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), without_autocast(), torch._C.DisableTorchFunction():
        return function(*args)


def _members(optimizer: Any) -> list[torch.Tensor]:
    return [p for group in objects.param_groups(optimizer) for p in group["params"]]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a distributed tensor."""
    to_local = getattr(tensor, "to_local", None)
    local: torch.Tensor = tensor.detach() if to_local is None else to_local().detach()
    return local


def _values(tensor: torch.Tensor) -> torch.Tensor:
    """The real elements, those that are stored of a sparse tensor."""
    tensor = _local(tensor)
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _exact_dtype(tensor: torch.Tensor) -> torch.dtype:
    """To sum in; Metal has no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _sampled(values: torch.Tensor, elements: int) -> torch.Tensor:
    """Every n-th element, at most ``elements`` of them."""
    count = values.numel()
    stride = max(-(-count // elements), 1)
    while math.gcd(stride, count) > 1:
        stride += 1
    return values.reshape(-1)[::stride]


def _copied(values: torch.Tensor) -> torch.Tensor:
    """Out of reach of what is done in place later, such as clipping."""
    return values.to(torch.float32, copy=True)


def _moments(values: torch.Tensor) -> dict[str, float]:
    dtype = _exact_dtype(values)
    norm = float(torch.linalg.vector_norm(values, dtype=dtype))
    return {"mean": float(values.mean(dtype=dtype)), "rms": norm / math.sqrt(values.numel())}


def _described(tensor: torch.Tensor, detailed: bool) -> dict[str, Any]:
    """The fields of ``record.OutputTensor``."""
    values = _local(tensor)
    sample = top1 = lead = None
    if detailed:
        sample = _base64(_sampled(values, SAMPLE_ELEMENTS).float())
        if values.dim() > 1 and values.shape[-1] > 1:
            rows = values.reshape(-1, values.shape[-1])
            rows = rows[:: -(-rows.shape[0] // TOP1_ROWS)].float()
            best = rows.topk(2, dim=-1)
            top1 = _base64(best.indices[:, 0].int())
            lead = _base64(best.values[:, 0] - best.values[:, 1])
    return {
        "shape": list(values.shape),
        **_moments(values),
        "sample": sample,
        "top1": top1,
        "lead": lead,
    }


def _state(name: str, root: Any) -> dict[str, Any]:
    """The fields of ``record.RootState``."""
    buffers = [
        (n, b) for n, b in objects.named_buffers(root) if b.is_floating_point() and b.numel()
    ]
    tensors = [*objects.parameters(root), *objects.buffers(root)]
    return {
        "root": name,
        "digest": _digest(tensors),
        "non_finite": sum(
            int((~torch.isfinite(_values(t))).sum()) for t in tensors if t.is_floating_point()
        ),
        "buffers": [{"name": n, **_moments(_local(b))} for n, b in buffers],
    }


def _digest(tensors: Iterable[torch.Tensor]) -> str:
    """SHA-256 of types, sizes and elements."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        on_host = _on_host(_local(tensor))
        digest.update(_bytes(on_host))
    return digest.hexdigest()


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """With the elements in the order of their indices."""
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().cpu().contiguous()


def _bytes(on_host: torch.Tensor) -> Any:
    """The memory of a contiguous tensor, which must live as long as this; NumPy may be missing."""
    size = on_host.numel() * on_host.element_size()
    return (ctypes.c_char * size).from_address(on_host.data_ptr()) if size else b""


def _base64(values: torch.Tensor) -> str:
    """Elements of four bytes, little-endian."""
    on_host = _on_host(values)
    data = bytes(_bytes(on_host))
    if sys.byteorder == "big":
        words = array("I", data)
        words.byteswap()
        data = words.tobytes()
    return b64encode(data).decode()
