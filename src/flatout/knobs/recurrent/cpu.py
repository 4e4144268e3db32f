"""Gated recurrent units on the CPU, all time steps of a layer in one call of ``kernels/gru.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from flatout.intercept import dispatch
from flatout.intercept.containment import OnFailure
from flatout.intercept.patch import Undo

MOST_WIDTH = 512
"""Beyond it the matrix products take the time, and torch's are better."""


class Layer(ctypes.Structure):
    """``Layer`` of ``kernels/gru.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "batch", "width")),
        *((name, ctypes.c_void_p) for name in ("inputs", "first", "weight", "turned", "bias")),
        *((name, ctypes.c_void_p) for name in ("states", "kept")),
        *((name, ctypes.c_int32) for name in ("backwards", "threads")),
    )


class Kernel:
    """``kernels/gru.c``.

    Args:
        library: of it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.forward: Callable[..., None] = library.gru_forward
        self.backward: Callable[..., None] = library.gru_backward
        for function, count in ((library.gru_forward, 2), (library.gru_backward, 5)):
            function.restype = None
            function.argtypes = [ctypes.c_void_p] * count


class Recurrence(dispatch.RecordedFunction):
    """One direction of one layer, after the products of its input."""


class Job(NamedTuple):
    """What is asked for, besides the tensors; see ``dispatch.GradientRule``.

    Attributes:
        is_backwards: from the last step to the first.
        kernel: the compiled part.
        on_failure: told of a failure.
    """

    is_backwards: bool
    kernel: Kernel
    on_failure: OnFailure

    def gradients(
        self, saved: Sequence[Any], needed: Sequence[bool], gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """See ``dispatch.GradientRule``."""
        inputs, first, weight, bias, states, kept = saved
        return _gradients(gradient, inputs, first, weight, bias, states, kept, self)

    def fallback_gradients(
        self, saved: Sequence[Any], needed: Sequence[bool], gradient: torch.Tensor
    ) -> list[torch.Tensor | None]:
        """See ``dispatch.GradientRule``."""
        given = list(saved[:4])
        create_graph = torch.is_grad_enabled()
        if not create_graph:
            given = [x if x is None else x.detach().requires_grad_() for x in given]
        inputs, first, weight, bias = given
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            again = differentiable(inputs, first, weight, bias, self.is_backwards)
            asked = [x for x, is_needed in zip(given, needed, strict=True) if is_needed]
            found = torch.autograd.grad(again, asked, gradient, create_graph=create_graph)
        each = iter(found)
        return [next(each) if is_needed else None for is_needed in needed]


def recurrence(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    job: Job,
) -> torch.Tensor:
    """The states, steps x batch x width.

    Args:
        inputs: steps x batch x 3 width, contiguous.
        first: batch x width, contiguous.
        weight: 3 width x width, contiguous.
        bias: 3 width.
        job: what is asked for.
    """
    given = inputs, first, weight, bias
    made = dispatch.attempt_below_autograd(job.on_failure, _states, *given, job)
    if made is None:
        return differentiable(*given, job.is_backwards)
    return dispatch.record_in_graph(Recurrence, job, made[0], (*given, *made), *given)


def _states(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    job: Job,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states, and what backward wants of each besides."""
    steps, batch, all_gates = inputs.shape
    states = inputs.new_empty(steps, batch, all_gates // 3)
    kept = inputs.new_empty(steps, batch, all_gates // 3 * 4)
    turned = weight.t().contiguous()
    layer = _layer(inputs, first, weight, bias, states, kept, job.is_backwards)
    layer.turned = turned.data_ptr()
    scratch = inputs.new_empty(batch, all_gates)
    job.kernel.forward(ctypes.addressof(layer), scratch.data_ptr())
    return states, kept


def _gradients(
    gradient: torch.Tensor,
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    kept: torch.Tensor,
    job: Job,
) -> tuple[torch.Tensor | None, ...]:
    steps, batch, width = states.shape
    gradient = gradient.contiguous()
    of_inputs, of_products = torch.empty_like(inputs), torch.empty_like(inputs)
    of_first = torch.zeros_like(first)
    layer = _layer(inputs, first, weight, bias, states, kept, job.is_backwards)
    job.kernel.backward(
        ctypes.addressof(layer),
        *(x.data_ptr() for x in (gradient, of_first, of_inputs, of_products)),
    )
    before = torch.empty_like(states)
    if job.is_backwards:
        before[:-1], before[-1] = states[1:], first
    else:
        before[1:], before[0] = states[:-1], first
    flat = of_products.view(steps * batch, 3 * width)
    of_weight = flat.t() @ before.view(steps * batch, width)
    return of_inputs, of_first, of_weight, None if bias is None else flat.sum(0)


def _layer(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    kept: torch.Tensor,
    is_backwards: bool,
) -> Layer:
    steps, batch, width = states.shape
    return Layer(
        steps=steps,
        batch=batch,
        width=width,
        inputs=inputs.data_ptr(),
        first=first.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        states=states.data_ptr(),
        kept=kept.data_ptr(),
        backwards=is_backwards,
        threads=torch.get_num_threads(),
    )


def differentiable(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_backwards: bool,
) -> torch.Tensor:
    """The states by operations of torch; see ``Recurrence.forward``."""
    state, states = first, []
    for step in reversed(inputs) if is_backwards else inputs:
        input_r, input_z, input_n = step.chunk(3, 1)
        state_r, state_z, state_n = F.linear(state, weight, bias).chunk(3, 1)
        r, z = torch.sigmoid(input_r + state_r), torch.sigmoid(input_z + state_z)
        n = torch.tanh(input_n + r * state_n)
        state = (state - n) * z + n
        states.append(state)
    return torch.stack(states[::-1] if is_backwards else states)


def gru(
    sequence: torch.Tensor,
    first: torch.Tensor,
    params: Sequence[torch.Tensor],
    options: tuple[bool, int, float, bool, bool, bool],
    kernel: Kernel,
    on_failure: OnFailure,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All layers and directions.

    Args:
        sequence: steps x batch x features, or with the batch first.
        first: layers and directions x batch x width.
        params: of each layer and direction: for the input, for the state, and perhaps biases.
        options: has_biases, num_layers, dropout, train, bidirectional, batch_first, as
            ``aten::gru.input`` gets them.
        kernel: the compiled part.
        on_failure: told when a pass failed and was gone in operations of torch.
    """
    has_biases, num_layers, dropout, train, bidirectional, batch_first = options
    if batch_first:
        sequence = sequence.transpose(0, 1)
    each = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    last: list[torch.Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            of_input, of_state, *biases = params[number * each : (number + 1) * each]
            outputs.append(
                recurrence(
                    F.linear(sequence, of_input, biases[0] if biases else None).contiguous(),
                    first[number].contiguous(),
                    of_state.contiguous(),
                    biases[1].clone() if biases else None,  # saved, as torch saves none
                    Job(direction == 1, kernel, on_failure),
                )
            )
            last.append(outputs[-1][0 if direction else -1])
        sequence = torch.cat(outputs, 2) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            sequence = F.dropout(sequence, dropout, True)
    if sequence.requires_grad and not bidirectional:
        sequence = sequence.clone()  # the states are saved, and the program may write to these
    if batch_first:
        sequence = sequence.transpose_(0, 1)  # in place, as torch does: it is no view
    return sequence, torch.stack(last)


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace gated recurrent units on the CPU; returns what puts torch's own back.

    Args:
        library: of ``kernels/gru.c``.
        on_failure: told when a pass failed and was gone in operations of torch.
    """
    kernel = Kernel(library)

    def replacement(
        below: Callable[..., Any],
        sequence: torch.Tensor,
        first: torch.Tensor,
        params: Sequence[torch.Tensor],
        *options: Any,  # the rest of its arguments
    ) -> dispatch.DeferredCall | None:
        exact = sequence.dtype, first.dtype
        if torch.is_autocast_enabled("cpu"):
            exact = torch.float32, torch.float32
        if not can_take(sequence, first, params, exact):
            return None
        return dispatch.DeferredCall(
            _exact, (sequence, first, exact, params, options, kernel, on_failure)
        )

    return dispatch.override_operators(
        {"gru.input": replacement}, "AutogradCPU", "CPU", on_failure=on_failure
    )


def _exact(
    sequence: torch.Tensor,
    first: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with tensors brought into other types, and back."""
    with torch.autocast("cpu", enabled=False):
        output, last = gru(sequence.to(dtypes[0]), first.to(dtypes[1]), *rest)
    return output.to(sequence.dtype), last.to(first.dtype)


def can_take(
    sequence: torch.Tensor,
    first: torch.Tensor,
    params: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
) -> bool:
    """Whether these are plain tensors of a narrow unit, outside of what transforms, and are, or
    will be, of float32."""
    return (
        dispatch.are_plain(sequence, first, *params)
        and all(dtype is torch.float32 for dtype in (*dtypes, *(x.dtype for x in params)))
        and sequence.dim() == 3
        and min(sequence.shape) > 0
        and params[1].shape[1] == first.shape[2] <= MOST_WIDTH
    )
