"""Recording the first gradients of each parameter, for a proof.

Gradients are read at the end of the last backward call before an optimizer step, so they do not
show clipping, or what a gradient scaler does between backward and the step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.flows import Flows, is_sum_of_terms
from flatout.agent.tensors import norm, sample, stored_values, to_floats
from flatout.intercept import objects
from flatout.intercept.gradients import stored_gradient
from flatout.wire.lines import Gradients, NamedGradient

if TYPE_CHECKING:
    from flatout.agent.root_names import RootNames
    from flatout.intercept.containment import OnFailure
    from flatout.intercept.host import Host

SAMPLE_BYTES = 4 * 2**20
"""The total size of all samples of gradients of a process."""

SAMPLE_ELEMENTS, LEAST_ELEMENTS = 2048, 16
"""The largest and the smallest sample of one gradient. If the limit of the process allows only a
smaller sample, only the norm is recorded."""

IDLE_BACKWARDS = 32
"""After this many backward calls for each requested gradient of a parameter, the inspection ends
even if some parameters have had no gradient, once an optimizer has stepped."""


@dataclass(frozen=True)
class _ReadGradient:
    """A gradient at the end of backward, still on its device.

    Attributes:
        norm: the Euclidean norm, as a scalar tensor.
        elements: the number of elements.
        sample: the values of some elements; ``None``: not recorded.
    """

    norm: torch.Tensor
    elements: int
    sample: torch.Tensor | None


class GradientInspector:
    """Records the gradients that the first optimizer steps of each parameter use.

    Args:
        host: the host of this process.
        updates: the number of optimizer steps of each parameter that are recorded.
        only_in_warmup: see ``wire.request.Inspection``.
        roots: the root modules, in which the names of parameters are looked up.
        contain: calls a function with arguments; if the function fails, returns ``None`` and ends
            the inspection.
        on_failure: called when the backward wrapper itself has failed.

    Attributes:
        backwards: the number of outermost backward calls so far that accumulated gradients.
    """

    def __init__(
        self,
        host: Host,
        updates: int,
        only_in_warmup: bool,
        roots: RootNames,
        contain: Callable[..., Any],
        on_failure: OnFailure,
    ) -> None:
        self.backwards = 0
        self._host = host
        self._wanted_updates = updates
        self._only_in_warmup = only_in_warmup
        self._roots = roots
        self._contain = contain
        self._names: dict[int, tuple[str, torch.Tensor]] = {}
        self._nameless = 0
        self._updates: Counter[int] = Counter()
        self._read: dict[int, _ReadGradient] = {}
        self._sample_elements: int | None = None
        self._backward_depth = 0
        self._stepping: Any = None
        self._flows = Flows(contain)
        self._is_active = updates > 0
        if self._is_active:
            host.backward_wrappers.append(self._backward, on_failure)
            host.before_optimizer_step.append(self._before_step)
            host.after_optimizer_step.append(self._after_step)

    def stop(self) -> None:
        """Remove the callbacks, and release the parameters."""
        if self._is_active:
            self._is_active = False
            self._host.backward_wrappers.remove(self._backward)
            self._host.before_optimizer_step.remove(self._before_step)
            self._host.after_optimizer_step.remove(self._after_step)
        self._names.clear()
        self._read.clear()

    # Callbacks

    def _backward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._only_in_warmup and self._host.mark != "first":
            self.stop()
        self._backward_depth += 1
        accumulates = kwargs.get("accumulate_grad")
        if accumulates and self._is_active:
            self._contain(self._flows.watch, args[0])
        try:
            result = call(*args, **kwargs)
        finally:
            self._backward_depth -= 1
            if self._backward_depth == 0:
                self._flows.remove_hooks()
        if self._backward_depth == 0 and accumulates and self._is_active:
            self._contain(self._end_backward)
        return result

    def _before_step(self, optimizer: Any) -> None:
        self._contain(self._begin_step, optimizer)

    def _after_step(self, optimizer: Any) -> None:
        self._stepping = None

    # Reading and writing

    def _end_backward(self) -> None:
        self.backwards += 1
        parameters = self._find_trainable()
        is_idle = self._updates and self.backwards > IDLE_BACKWARDS * self._wanted_updates
        if is_idle or all(self._updates[id(p)] >= self._wanted_updates for p in parameters):
            self.stop()
            return
        self._read_gradients(parameters)
        if not self._host.hooks.optimizer_exists:
            self._write_gradients(parameters)
        elif self._stepping is not None:  # backward was called in the closure of a step
            self._write_gradients(_parameters_of(self._stepping))
            self._stepping = None

    def _begin_step(self, optimizer: Any) -> None:
        parameters = _parameters_of(optimizer)
        if self._backward_depth:  # the optimizer steps in a hook, while backward runs
            self._read_gradients(parameters)
        elif all(id(p) not in self._read for p in parameters):
            self._stepping = optimizer
        self._write_gradients(parameters)

    def _find_trainable(self) -> list[torch.Tensor]:
        """Return all parameters of optimizers and roots that require a gradient."""
        found = [p for optimizer in self._host.optimizers for p in _parameters_of(optimizer)]
        found += [p for _, root in self._roots for p in objects.parameters(root)]
        return list({id(p): p for p in found if p.requires_grad}.values())

    def _read_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Read the gradients of those parameters that have one and of which more are wanted."""
        for parameter in parameters:
            grad = stored_gradient.__get__(parameter)
            if grad is None or self._updates[id(parameter)] >= self._wanted_updates:
                continue
            if self._sample_elements is None:
                self._sample_elements = self._affordable_elements()
            values = stored_values(grad)
            has_sample = self._sample_elements >= LEAST_ELEMENTS and not grad.is_sparse
            self._read[id(parameter)] = _ReadGradient(
                norm(values),
                values.numel(),
                # A copy: clipping and optimizers change gradients in place.
                sample(values, self._sample_elements).to(torch.float32, copy=True)
                if has_sample
                else None,
            )

    def _affordable_elements(self) -> int:
        """Return the size of each sample, in elements of four bytes."""
        count = len(self._find_trainable())
        elements = SAMPLE_BYTES // (4 * max(count, 1) * self._wanted_updates)
        if elements < LEAST_ELEMENTS:
            why = f"of the gradients of {count} parameters only the norms are recorded"
            self._host.events.add("skipped", "inspection", why)
        return min(elements, SAMPLE_ELEMENTS)

    def _write_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Record the gradients that have been read, for the parameters of one optimizer step."""
        entries = []
        for parameter in parameters:
            read = self._read.pop(id(parameter), None)
            if read is None:
                continue
            self._updates[id(parameter)] += 1
            flow, is_sum = self._flows.take(parameter), is_sum_of_terms(parameter)
            entries.append(
                NamedGradient(
                    norm=float(read.norm),
                    elements=read.elements,
                    sample=None if read.sample is None else to_floats(read.sample),
                    roundoff=None if flow is None else flow.roundoff,
                    noise=float(flow.noise) if flow is not None and is_sum else None,
                    name=self._parameter_name(parameter),
                )
            )
        if entries:
            self._host.record.write(Gradients(tuple(entries)))

    def _parameter_name(self, parameter: torch.Tensor) -> str:
        """Return the name of a parameter in the first root that has it, or else a numbered name."""
        names = self._names
        if id(parameter) not in names:
            known = {name for name, _ in names.values()}
            for root_name, root in self._roots:
                for name, member in objects.named_parameters(root):
                    full_name = f"{root_name}.{name}"
                    if id(member) not in names and full_name not in known:
                        names[id(member)] = (full_name, member)
        if id(parameter) not in names:
            self._nameless += 1
            names[id(parameter)] = (f"parameter {self._nameless} in no module", parameter)
        return names[id(parameter)][0]


def _parameters_of(optimizer: Any) -> list[torch.Tensor]:
    return [p for group in objects.param_groups(optimizer) for p in group["params"]]
