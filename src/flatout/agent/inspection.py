"""Recording results of the program for a proof: the first gradients, evaluation outputs, final
state.

The inspection changes nothing: it draws no random numbers, records no autograd graph, and runs
outside of autocast. The only trace is one more frame in the traceback of an exception that backward
raises.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.gradient_inspection import SAMPLE_ELEMENTS, GradientInspector
from flatout.agent.root_names import RootNames
from flatout.agent.tensors import (
    digest,
    local_part,
    moments,
    sample,
    stored_values,
    to_floats,
    to_ints,
)
from flatout.intercept import objects
from flatout.intercept.capture import is_capturing
from flatout.intercept.containment import attempt
from flatout.intercept.modes import without_autocast
from flatout.intercept.nested import tensors_in
from flatout.wire.lines import (
    BufferState,
    Output,
    OutputTensor,
    RootState,
    State,
)

if TYPE_CHECKING:
    from flatout.intercept.host import Host
    from flatout.wire.request import Inspection

TOP1_ROWS = 2048
"""The largest number of rows of an output whose largest element is recorded."""

OUTPUT_TENSORS = 4
"""The largest number of tensors of one output that are recorded."""

OUTPUT_LIMIT = 2000
"""The largest number of forward calls whose outputs are recorded."""

CERTAIN_PASSES = 3
"""The number of forward calls of a module after each of which the host checks whether the outputs
lie in [0, 1]. If they do in all of these calls, further outputs are checked without waiting."""


class Inspector:
    """Records the results that the request asks for.

    A failure of the inspection is recorded with its traceback and ends the inspection, not the
    program.

    Args:
        host: the host of this process. Its settings have been applied, so that the callbacks of the
            inspection are called around those of the knobs, and get the same results as the
            program.
        inspection: what to record.
    """

    def __init__(self, host: Host, inspection: Inspection) -> None:
        self._host = host
        self._inspection = inspection
        self._roots = RootNames()
        self._probabilities: dict[int, _Probabilities] = {}
        self._outputs = 0
        self._is_active = True
        host.forward_wrappers.append(self._forward)
        self._gradients = GradientInspector(
            host,
            inspection.gradient_steps,
            inspection.only_in_warmup,
            self._roots,
            self._contain,
            self._on_failure,
        )

    def close(self) -> None:
        """Record the state of the modules if the request asks for it, and stop."""
        if self._is_active and self._inspection.state:
            self._contain(self._write_state)
        self.stop()

    def stop(self) -> None:
        """Remove the callbacks, and release the modules."""
        if self._is_active:
            self._is_active = False
            self._host.forward_wrappers.remove(self._forward)
        self._gradients.stop()
        self._roots.clear()

    def _contain(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function without autograd graph and autocast, and return its result; ``None`` if
        it fails."""
        return attempt(self._on_failure, _call_unobserved, function, *args)

    def _on_failure(self, error: Exception) -> None:
        why = f"ended: {type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        self._host.events.add("failed", "inspection", why, trace)
        self.stop()

    # Forward passes

    def _forward(
        self,
        call: Callable[..., Any],
        module: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._roots.add(module)
        if not self._wants_output(module):
            output = call(module, *args, **kwargs)
            if self._inspection.state and torch.is_grad_enabled() and module in self._roots:
                found = self._probabilities.get(id(module))
                if found is None or not found.is_ruled_out:
                    self._contain(self._count_saturated, module, output)
            return output
        is_detailed = self._outputs < self._inspection.outputs
        inputs = self._contain(digest, tensors_in((args, kwargs))) if is_detailed else None
        output = call(module, *args, **kwargs)
        if self._is_active:
            self._contain(self._write_output, module, inputs, output, is_detailed)
        return output

    def _wants_output(self, module: Any) -> bool:
        if torch.is_grad_enabled() and objects.is_training(module):
            return False
        inspection = self._inspection
        if self._outputs >= inspection.outputs:
            trains = self._gradients.backwards > 0 or self._host.hooks.optimizer_exists
            if not inspection.state or not trains or self._outputs >= OUTPUT_LIMIT:
                return False
        return not is_capturing()

    def _write_output(self, module: Any, inputs: str | None, output: Any, detailed: bool) -> None:
        self._outputs += 1
        tensors = list(tensors_in(output))
        floating = [t for t in tensors if t.is_floating_point() and t.numel()]
        self._host.record.write(
            Output(
                root=self._roots.name_of(module),
                inputs=inputs,
                digest=digest(tensors) if detailed else None,
                tensors=tuple(_describe(t, detailed) for t in floating[:OUTPUT_TENSORS]),
            )
        )

    def _count_saturated(self, module: Any, output: Any) -> None:
        """Count the elements that are exactly 1 in the first floating-point tensor of an output."""
        probabilities = self._probabilities.setdefault(id(module), _Probabilities())
        for tensor in tensors_in(output):
            if tensor.is_floating_point() and tensor.dim() and tensor.numel():
                probabilities.add(local_part(tensor))
                return

    # The final state

    def _write_state(self) -> None:
        nothing = _Probabilities()
        roots = (
            _describe_state(name, root, *self._probabilities.get(id(root), nothing).counts())
            for name, root in self._roots
        )
        self._host.record.write(State(tuple(roots)))


class _Probabilities:
    """Finds out whether outputs look like probabilities, and counts the elements that are exactly
    1.

    Attributes:
        is_ruled_out: whether an output was no probability, so that no further one is looked at.
    """

    def __init__(self) -> None:
        self._elements = 0
        self._passes = 0
        self._saturated: torch.Tensor | None = None
        self._outside: torch.Tensor | None = None
        self.is_ruled_out = False

    def add(self, values: torch.Tensor) -> None:
        """Add an output. The host waits for an accelerator at the first ``CERTAIN_PASSES`` only."""
        if self.is_ruled_out:
            return
        sampled = sample(values, SAMPLE_ELEMENTS)
        outside = ((sampled < 0) | (sampled > 1)).any()
        saturated = (sampled == 1).sum()
        self._outside = outside if self._outside is None else self._outside | outside
        self._saturated = saturated if self._saturated is None else self._saturated + saturated
        self._elements += sampled.numel()
        self._passes += 1
        self.is_ruled_out = self._passes <= CERTAIN_PASSES and bool(self._outside)

    def counts(self) -> tuple[int, int]:
        """Return ``probability_count`` and ``saturated_count`` of ``lines.RootState``."""
        if self._saturated is None or self._outside is None or bool(self._outside):
            return 0, 0
        return self._elements, int(self._saturated)


def _call_unobserved(function: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), without_autocast(), torch._C.DisableTorchFunction():
        return function(*args)


def _describe(tensor: torch.Tensor, detailed: bool) -> OutputTensor:
    values = local_part(tensor)
    sampled = top1 = lead = None
    if detailed:
        sampled = to_floats(sample(values, SAMPLE_ELEMENTS).float())
        if values.dim() > 1 and values.shape[-1] > 1:
            rows = values.reshape(-1, values.shape[-1])
            rows = rows[:: -(-rows.shape[0] // TOP1_ROWS)].float()
            best = rows.topk(2, dim=-1)
            top1 = to_ints(best.indices[:, 0].int())
            lead = to_floats(best.values[:, 0] - best.values[:, 1])
    return OutputTensor(tuple(values.shape), *moments(values), sampled, top1, lead)


def _describe_state(
    name: str, root: Any, probability_count: int, saturated_count: int
) -> RootState:
    buffers = [
        (n, b) for n, b in objects.named_buffers(root) if b.is_floating_point() and b.numel()
    ]
    tensors = [*objects.parameters(root), *objects.buffers(root)]
    return RootState(
        root=name,
        digest=digest(tensors),
        non_finite=sum(
            int((~torch.isfinite(stored_values(t))).sum()) for t in tensors if t.is_floating_point()
        ),
        buffers=tuple(BufferState(n, *moments(local_part(b))) for n, b in buffers),
        probability_count=probability_count,
        saturated_count=saturated_count,
    )
