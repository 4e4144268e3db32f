"""Making a described call again: tensors of the same form, and the call on them.

The tensors are made up: they repeat a sample of the values of the real ones, because zeros and tiny
numbers may take another time than others. Indices and masks are copies, and so is the state of
optimizers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from flatout.agent.calls import Form, StepForm, TensorForm, Values, leave, thaw
from flatout.intercept.nested import tensors_in
from flatout.knob import Inside


class Prepared(NamedTuple):
    """A call that can be made many times.

    Attributes:
        run: makes the call and its backward pass under settings that are applied; returns the
            tensors that the call returns.
        renew: called before each call, to undo what it writes; ``None``: it writes nothing.
        weight: the first of its parameters that is not its first tensor.
    """

    run: Callable[[Inside], list[torch.Tensor]]
    renew: Callable[[], None] | None = None
    weight: torch.Tensor | None = None


def size_bytes(form: Form | StepForm) -> int:
    """Return about how much memory a call needs: its tensors, results and gradients."""
    if isinstance(form, StepForm):
        parameters = [p for _, members in form.groups for p, _ in members]
        return 5 * sum(map(_tensor_bytes, parameters))
    return 3 * sum(map(_tensor_bytes, form.tensors))


def _tensor_bytes(form: TensorForm) -> int:
    return math.prod(form.shape) * form.dtype.itemsize


def make_tensor(form: TensorForm, values: Values) -> torch.Tensor:
    """Make a tensor up."""
    if values.copy is not None:
        tensor = values.copy.to(form.dtype, copy=True)
        if not any(stride == 0 for stride in form.strides):
            tensor = torch.empty_strided(
                form.shape, form.strides, dtype=form.dtype, device=form.device
            ).copy_(values.copy)
    else:
        tensor = _repeat(form, values.sample)
    if form.is_parameter:
        return torch.nn.Parameter(tensor, requires_grad=form.requires_grad)
    return tensor.requires_grad_(form.requires_grad)


def _repeat(form: TensorForm, sample: torch.Tensor) -> torch.Tensor:
    size = 0
    if math.prod(form.shape):
        size = 1 + sum(s * (n - 1) for s, n in zip(form.strides, form.shape, strict=True))
    elements = 2 * size if form.dtype.is_complex else size
    if not sample.numel():
        sample = sample.new_zeros(1)
    if form.dtype.is_complex:
        flat = sample.repeat(-(-elements // sample.numel()))[:elements]
        memory = torch.view_as_complex(flat.view(-1, 2)).to(form.dtype)
    else:
        memory = sample.to(form.dtype).repeat(-(-elements // sample.numel()))[:elements]
    return memory.as_strided(form.shape, form.strides)


@functools.cache
def _normals(device: torch.device) -> Values:
    """Normally distributed values, the size of gradients."""
    generator = torch.Generator().manual_seed(0)
    return Values((0.01 * torch.randn(4093, generator=generator)).to(device))


def prepare(form: Form, tensors: Sequence[TensorForm], values: Sequence[Values]) -> Prepared:
    """Prepare a call of a torch function.

    Args:
        form: the call.
        tensors: the forms of its tensors, which settings may have changed.
        values: what is known about the values of the tensors.
    """
    originals = [make_tensor(*item) for item in zip(tensors, values, strict=True)]
    given = list(originals)
    sources: list[Any] = [t for t in originals if t.requires_grad]
    gradients: list[torch.Tensor] = []

    def renew() -> None:
        for number in form.written:
            original = originals[number]
            if form.is_recorded and original.requires_grad:
                given[number] = original.clone()  # autograd allows no writing into a leaf
            elif form.tensors[number].is_parameter:
                given[number] = torch.nn.Parameter(original.detach().clone())
            else:
                given[number] = original.detach().clone()

    def run(inside: Inside) -> list[torch.Tensor]:
        torch.clear_autocast_cache()  # a step casts each weight
        args, kwargs = thaw(form.arguments, given)
        if form.is_inside:
            args = inside.convert(form.function, args)
        result = form.function(*args, **kwargs)
        if form.function is leave:
            result = inside.leave(result)
        results = [result] if isinstance(result, torch.Tensor) else list(tensors_in(result))
        if form.is_recorded:
            ends = [tensor for tensor in results if tensor.requires_grad]
            if len(gradients) != len(ends):
                gradients[:] = [_gradient_of(tensor) for tensor in ends]
            torch.autograd.grad(ends, sources, gradients, allow_unused=True)
        return results

    weight = next((t for t in originals[1:3] if type(t) is torch.nn.Parameter), None)
    return Prepared(run, renew if form.written else None, weight)


def _gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    form = TensorForm.of(tensor.detach())
    if not form.shape or any(stride == 0 for stride in form.strides):
        return torch.ones_like(tensor)
    return make_tensor(form, _normals(form.device))


def prepare_step(
    form: StepForm, gradients: Sequence[Values], state: Sequence[dict[str, Any]]
) -> Prepared:
    """Prepare a step of an optimizer, with parameters, gradients and state of its own.

    Args:
        form: the step.
        gradients: what is known about the values of the gradients.
        state: a copy of the state of each parameter, which the step writes; if there are not as
            many as parameters, the first step makes it.
    """
    groups, stepped = [], []
    values = iter(gradients)
    for options, members in form.groups:
        parameters = []
        for parameter_form, gradient_form in members:
            parameter = make_tensor(parameter_form, _normals(parameter_form.device))
            parameter.grad = make_tensor(gradient_form, next(values))
            parameters.append(parameter)
        groups.append({"params": parameters, **dict(options)})
        stepped += parameters
    optimizer = form.optimizer(groups)
    if len(state) == len(stepped):
        optimizer.state.update(zip(stepped, state, strict=True))
    step = type(optimizer).step
    step = getattr(step, "__wrapped__", step)  # without the hooks that the program has registered

    def run(inside: Inside) -> list[torch.Tensor]:
        step(optimizer)
        return []

    return Prepared(run)
