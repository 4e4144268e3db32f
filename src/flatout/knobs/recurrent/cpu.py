"""Gated recurrent units on the CPU, all time steps of a layer in one call of ``kernels/gru.c``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from flatout.agent import dispatch
from flatout.knobs import Undo

OPERATOR = "aten::gru.input"

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


class Job(NamedTuple):
    """What is asked for, besides the tensors.

    Attributes:
        is_backwards: from the last step to the first.
        kernel: the compiled part.
        on_failure: called when the backward pass failed and was gone in operations of torch.
    """

    is_backwards: bool
    kernel: Kernel
    on_failure: Callable[[Exception], None]


class Recurrence(torch.autograd.Function):
    """One direction of one layer, after the products of its input."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        first: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        job: Job,
    ) -> torch.Tensor:
        """The states, steps x batch x width.

        Args:
            ctx: of autograd.
            inputs: steps x batch x 3 width, contiguous.
            first: batch x width, contiguous.
            weight: 3 width x width, contiguous.
            bias: 3 width.
            job: what is asked for.
        """
        steps, batch, all_gates = inputs.shape
        states = inputs.new_empty(steps, batch, all_gates // 3)
        kept = inputs.new_empty(steps, batch, all_gates // 3 * 4)
        turned = weight.t().contiguous()
        layer = _layer(inputs, first, weight, bias, states, kept, job.is_backwards)
        layer.turned = turned.data_ptr()
        scratch = inputs.new_empty(batch, all_gates)
        job.kernel.forward(ctypes.addressof(layer), scratch.data_ptr())
        ctx.save_for_backward(inputs, first, weight, bias, states, kept)
        ctx.job = job
        return states

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """See ``forward``; what it returns can be differentiated when that is asked for."""
        inputs, first, weight, bias, states, kept = ctx.saved_tensors
        job: Job = ctx.job
        with torch.autocast("cpu", enabled=False):
            if not torch.is_grad_enabled():
                try:
                    return *_gradients(
                        gradient, inputs, first, weight, bias, states, kept, job
                    ), None
                except Exception as error:  # noqa: BLE001 - reported
                    job.on_failure(error)
            needed = ctx.needs_input_grad[:4]
            create_graph = torch.is_grad_enabled()
            given: tuple[Any, Any, Any, Any] = inputs, first, weight, bias
            if not create_graph:
                detached = (x.detach().requires_grad_() if x is not None else None for x in given)
                given = next(detached), next(detached), next(detached), next(detached)
            with torch.enable_grad():
                again = differentiable(*given, job.is_backwards)
                asked = [x for x, is_needed in zip(given, needed, strict=True) if is_needed]
                found = torch.autograd.grad(again, asked, gradient, create_graph=create_graph)
        each = iter(found)
        return (*(next(each) if is_needed else None for is_needed in needed), None)


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
    on_failure: Callable[[Exception], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """All layers and directions.

    Args:
        sequence: steps x batch x features, or with the batch first.
        first: layers and directions x batch x width.
        params: of each layer and direction: for the input, for the state, and perhaps biases.
        options: has_biases, num_layers, dropout, train, bidirectional, batch_first, as
            ``aten::gru.input`` gets them.
        kernel: the compiled part.
        on_failure: called when a backward pass failed and was gone in operations of torch.
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
                Recurrence.apply(
                    F.linear(sequence, of_input, biases[0] if biases else None).contiguous(),
                    first[number].contiguous(),
                    of_state.contiguous(),
                    biases[1] if biases else None,
                    Job(direction == 1, kernel, on_failure),
                )
            )
            last.append(outputs[-1][0 if direction else -1])
        sequence = torch.cat(outputs, 2) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            sequence = F.dropout(sequence, dropout, True)
    if batch_first:
        sequence = sequence.transpose(0, 1)
    return sequence, torch.stack(last)


def install(library: ctypes.CDLL, on_failure: Callable[[Exception], None]) -> Undo:
    """Replace gated recurrent units on the CPU; returns what puts torch's own back.

    Args:
        library: of ``kernels/gru.c``.
        on_failure: called when a backward pass failed and was gone in operations of torch.
    """
    own = torch.library.get_kernel(OPERATOR, "AutogradCPU")
    kernel = Kernel(library)

    def replacement(
        keyset: Any,
        sequence: torch.Tensor,
        first: torch.Tensor,
        params: Sequence[torch.Tensor],
        *options: Any,  # the rest of its arguments
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exact = sequence, first
        if torch.is_autocast_enabled("cpu"):
            exact = sequence.float(), first.float()
        if can_take(*exact, params):
            with torch.autocast("cpu", enabled=False):
                output, last = gru(*exact, params, options, kernel, on_failure)
            return output.to(sequence.dtype), last.to(first.dtype)
        result: tuple[torch.Tensor, torch.Tensor] = own.call_boxed(
            keyset, sequence, first, params, *options
        )
        return result

    return dispatch.replace({"gru.input": replacement}, "AutogradCPU", "CPU")


def can_take(sequence: torch.Tensor, first: torch.Tensor, params: Sequence[torch.Tensor]) -> bool:
    """Whether these are plain float32 tensors of a narrow unit, outside of what transforms."""
    tensors = (sequence, first, *params)
    return (
        dispatch.are_plain(*tensors)
        and all(x.dtype is torch.float32 for x in tensors)
        and sequence.dim() == 3
        and min(sequence.shape) > 0
        and params[1].shape[1] == first.shape[2] <= MOST_WIDTH
    )
