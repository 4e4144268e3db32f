"""Recording the first gradients of each parameter, for a proof.

Gradients are read at the end of the last backward call before an update, so neither clipping nor
anything that a gradient scaler does between backward and the step is visible in them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flatout.agent.flows import Flows, is_sum_of_terms
from flatout.agent.tensors import sample, stored_values, summation_dtype, to_floats
from flatout.intercept import objects
from flatout.intercept.gradients import stored_gradient
from flatout.wire.lines import Gradients, NamedGradient

if TYPE_CHECKING:
    from flatout.agent.root_names import RootNames
    from flatout.intercept.containment import OnFailure
    from flatout.intercept.host import Host

SAMPLE_BYTES = 4 * 2**20
"""Size of all samples of gradients of a process, together."""

SAMPLE_ELEMENTS, LEAST_ELEMENTS = 2048, 16
"""Largest and smallest sample of one gradient. If the limit of the process allows only a smaller
one, no sample is recorded, only the norm."""

IDLE_BACKWARDS = 32
"""Backward calls for each requested gradient of a parameter, after which parameters that have no
gradient are not waited for any longer."""


@dataclass(frozen=True)
class _ReadGradient:
    """A gradient as backward has left it, still on its device."""

    norm: torch.Tensor
    elements: int
    sample: torch.Tensor | None


class GradientInspector:
    """Records the gradients that the first updates of each parameter use.

    Args:
        host: of this process.
        updates: how many updates of each parameter are recorded.
        roots: the root modules, which give parameters their names.
        contain: calls a function with arguments; it returns ``None`` and ends the inspection if the
            function fails.
        on_failure: called when the backward wrapper itself has failed.

    Attributes:
        backwards: how many outermost backward calls that accumulate gradients have ended.
    """

    def __init__(
        self,
        host: Host,
        updates: int,
        roots: RootNames,
        contain: Callable[..., Any],
        on_failure: OnFailure,
    ) -> None:
        self.backwards = 0
        self._host = host
        self._wanted_updates = updates
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
            host.before_optimizer_step.append(self._step_begins)
            host.after_optimizer_step.append(self._step_ends)

    def stop(self) -> None:
        """Remove the callbacks, and release the parameters."""
        if self._is_active:
            self._is_active = False
            self._host.backward_wrappers.remove(self._backward)
            self._host.before_optimizer_step.remove(self._step_begins)
            self._host.after_optimizer_step.remove(self._step_ends)
        self._names.clear()
        self._read.clear()

    # Callbacks

    def _backward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
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
            self._contain(self._backward_ends)
        return result

    def _step_begins(self, optimizer: Any) -> None:
        self._contain(self._before_step, optimizer)

    def _step_ends(self, optimizer: Any) -> None:
        self._stepping = None

    # Reading and writing

    def _backward_ends(self) -> None:
        self.backwards += 1
        parameters = self._trainable()
        if self.backwards > IDLE_BACKWARDS * self._wanted_updates or all(
            self._updates[id(p)] >= self._wanted_updates for p in parameters
        ):
            self.stop()
            return
        self._read_gradients(parameters)
        if not self._host.hooks.optimizer_exists:
            self._write_gradients(parameters)
        elif self._stepping is not None:  # backward was called in the closure of a step
            self._write_gradients(_parameters_of(self._stepping))
            self._stepping = None

    def _before_step(self, optimizer: Any) -> None:
        parameters = _parameters_of(optimizer)
        if self._backward_depth:  # the optimizer steps in a hook, while backward runs
            self._read_gradients(parameters)
        elif all(id(p) not in self._read for p in parameters):
            self._stepping = optimizer
        self._write_gradients(parameters)

    def _trainable(self) -> list[torch.Tensor]:
        """Return all parameters of optimizers and roots that may get a gradient."""
        found = [p for optimizer in self._host.optimizers for p in _parameters_of(optimizer)]
        found += [p for _, root in self._roots for p in objects.parameters(root)]
        return list({id(p): p for p in found if p.requires_grad}.values())

    def _read_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Read the gradients that there are, of those parameters of which more are wanted."""
        for parameter in parameters:
            grad = stored_gradient.__get__(parameter)
            if grad is None or self._updates[id(parameter)] >= self._wanted_updates:
                continue
            if self._sample_elements is None:
                self._sample_elements = self._affordable_elements()
            values = stored_values(grad)
            has_sample = self._sample_elements >= LEAST_ELEMENTS and not grad.is_sparse
            self._read[id(parameter)] = _ReadGradient(
                torch.linalg.vector_norm(values, dtype=summation_dtype(values)),
                values.numel(),
                # A copy: clipping and optimizers change gradients in place.
                sample(values, self._sample_elements).to(torch.float32, copy=True)
                if has_sample
                else None,
            )

    def _affordable_elements(self) -> int:
        """Return the size of each sample, in elements of four bytes."""
        count = len(self._trainable())
        elements = SAMPLE_BYTES // (4 * max(count, 1) * self._wanted_updates)
        if elements < LEAST_ELEMENTS:
            why = f"of the gradients of {count} parameters only the norms are recorded"
            self._host.events.add("skipped", "inspection", why)
        return min(elements, SAMPLE_ELEMENTS)

    def _write_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        """Record the gradients that have been read of the parameters of one update."""
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
        """Return the name in the first root that has the parameter, else a number."""
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
