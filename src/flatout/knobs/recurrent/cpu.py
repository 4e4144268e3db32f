"""Replace GRU on the CPU; one call of ``kernels/gru.c`` computes all time steps of a layer."""

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
"""The largest hidden size; above it, the matmuls take most of the time, and torch's are faster."""


class Layer(ctypes.Structure):
    """The same as ``Layer`` in ``kernels/gru.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("steps", "batch", "width")),
        *((name, ctypes.c_void_p) for name in ("inputs", "first", "weight", "transposed", "bias")),
        *((name, ctypes.c_void_p) for name in ("states", "kept")),
        *((name, ctypes.c_int32) for name in ("reverse", "threads")),
    )


class Kernel:
    """The functions of ``kernels/gru.c``.

    Args:
        library: compiled from that source.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.forward: Callable[..., None] = library.gru_forward
        self.backward: Callable[..., None] = library.gru_backward
        for function, count in ((library.gru_forward, 2), (library.gru_backward, 5)):
            function.restype = None
            function.argtypes = [ctypes.c_void_p] * count


class Recurrence(dispatch.RecordedFunction):
    """The autograd node of one direction of one layer, without the input matmuls."""


class Direction(NamedTuple):
    """One direction of one layer, and its gradients; see ``dispatch.GradientRule``.

    Attributes:
        is_reverse: whether it goes from the last time step to the first.
        kernel: the compiled kernel.
        on_failure: called with the exception if the kernel fails.
    """

    is_reverse: bool
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
        arguments = list(saved[:4])
        create_graph = torch.is_grad_enabled()
        if not create_graph:
            arguments = [x if x is None else x.detach().requires_grad_() for x in arguments]
        inputs, first, weight, bias = arguments
        with torch.autocast("cpu", enabled=False), torch.enable_grad():
            states = compute_with_torch(inputs, first, weight, bias, self.is_reverse)
            sources = [x for x, is_needed in zip(arguments, needed, strict=True) if is_needed]
            gradients = torch.autograd.grad(states, sources, gradient, create_graph=create_graph)
        remaining = iter(gradients)
        return [next(remaining) if is_needed else None for is_needed in needed]


def recurrence(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    direction: Direction,
) -> torch.Tensor:
    """Compute the hidden states of all time steps, steps x batch x width.

    Args:
        inputs: the matmuls of the layer's input; steps x batch x 3 width, contiguous.
        first: the initial state; batch x width, contiguous.
        weight: 3 width x width, contiguous.
        bias: 3 width.
        direction: the direction of the layer.
    """
    arguments = inputs, first, weight, bias
    results = dispatch.attempt_below_autograd(direction.on_failure, _states, *arguments, direction)
    if results is None:
        return compute_with_torch(*arguments, direction.is_reverse)
    saved = (*arguments, *results)
    return dispatch.record_in_graph(Recurrence, direction, results[0], saved, *arguments)


def _states(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    direction: Direction,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The states, and the values of each time step that the backward pass needs besides."""
    steps, batch, all_gates = inputs.shape
    states = inputs.new_empty(steps, batch, all_gates // 3)
    kept = inputs.new_empty(steps, batch, all_gates // 3 * 4)
    transposed = weight.t().contiguous()
    layer = _layer(inputs, first, weight, bias, states, kept, direction.is_reverse)
    layer.transposed = transposed.data_ptr()
    scratch = inputs.new_empty(batch, all_gates)
    direction.kernel.forward(ctypes.addressof(layer), scratch.data_ptr())
    return states, kept


def _gradients(
    gradient: torch.Tensor,
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    kept: torch.Tensor,
    direction: Direction,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of inputs, first, weight and bias."""
    steps, batch, width = states.shape
    gradient = gradient.contiguous()
    of_inputs, of_matmuls = torch.empty_like(inputs), torch.empty_like(inputs)
    of_first = torch.zeros_like(first)
    layer = _layer(inputs, first, weight, bias, states, kept, direction.is_reverse)
    direction.kernel.backward(
        ctypes.addressof(layer),
        *(x.data_ptr() for x in (gradient, of_first, of_inputs, of_matmuls)),
    )
    previous = torch.empty_like(states)
    if direction.is_reverse:
        previous[:-1], previous[-1] = states[1:], first
    else:
        previous[1:], previous[0] = states[:-1], first
    flat = of_matmuls.view(steps * batch, 3 * width)
    of_weight = flat.t() @ previous.view(steps * batch, width)
    return of_inputs, of_first, of_weight, None if bias is None else flat.sum(0)


def _layer(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    kept: torch.Tensor,
    is_reverse: bool,
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
        reverse=is_reverse,
        threads=torch.get_num_threads(),
    )


def compute_with_torch(
    inputs: torch.Tensor,
    first: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    is_reverse: bool,
) -> torch.Tensor:
    """Compute the states with torch's operators, so that autograd can record them.

    The arguments are those of ``recurrence``.
    """
    state, states = first, []
    for step in reversed(inputs) if is_reverse else inputs:
        input_r, input_z, input_n = step.chunk(3, 1)
        state_r, state_z, state_n = F.linear(state, weight, bias).chunk(3, 1)
        r, z = torch.sigmoid(input_r + state_r), torch.sigmoid(input_z + state_z)
        n = torch.tanh(input_n + r * state_n)
        state = (state - n) * z + n
        states.append(state)
    return torch.stack(states[::-1] if is_reverse else states)


def gru(
    sequence: torch.Tensor,
    first: torch.Tensor,
    params: Sequence[torch.Tensor],
    options: tuple[bool, int, float, bool, bool, bool],
    kernel: Kernel,
    on_failure: OnFailure,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute all layers and directions of a GRU.

    Args:
        sequence: steps x batch x features, or batch x steps x features with ``batch_first``.
        first: the initial states; (layers x directions) x batch x width.
        params: for each layer and direction, the weight for the input, the weight for the state,
            and two biases if there are any.
        options: has_biases, num_layers, dropout, train, bidirectional, batch_first, as
            ``aten::gru.input`` gets them.
        kernel: the compiled kernel.
        on_failure: called with the exception if the kernel fails; torch's operators are then used.

    Returns:
        The states of the last layer for all time steps, and the last states of each layer and
        direction.
    """
    has_biases, num_layers, dropout, train, bidirectional, batch_first = options
    if batch_first:
        sequence = sequence.transpose(0, 1)
    params_per_direction = 4 if has_biases else 2
    directions = 2 if bidirectional else 1
    last_states: list[torch.Tensor] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            begin = number * params_per_direction
            input_weight, state_weight, *biases = params[begin : begin + params_per_direction]
            outputs.append(
                recurrence(
                    F.linear(sequence, input_weight, biases[0] if biases else None).contiguous(),
                    first[number].contiguous(),
                    state_weight.contiguous(),
                    # Torch does not save the bias, so the program may modify it.
                    biases[1].clone() if biases else None,
                    Direction(direction == 1, kernel, on_failure),
                )
            )
            last_states.append(outputs[-1][0 if direction else -1])
        sequence = torch.cat(outputs, 2) if bidirectional else outputs[0]
        if dropout and train and layer < num_layers - 1:
            sequence = F.dropout(sequence, dropout, True)
    if sequence.requires_grad and not bidirectional:
        sequence = sequence.clone()  # the states are saved, and the program may modify its output
    if batch_first:
        sequence = sequence.transpose_(0, 1)  # in place, as in torch, so the output is no view
    return sequence, torch.stack(last_states)


def install(library: ctypes.CDLL, on_failure: OnFailure) -> Undo:
    """Replace GRU on the CPU; returns the undo.

    Args:
        library: compiled from ``kernels/gru.c``.
        on_failure: called with the exception if the kernel fails; torch's operators are then used.
    """
    kernel = Kernel(library)

    def gru_input(
        torch_kernel: Callable[..., Any],
        sequence: torch.Tensor,
        first: torch.Tensor,
        params: Sequence[torch.Tensor],
        *options: Any,
    ) -> dispatch.DeferredCall | None:
        dtypes = sequence.dtype, first.dtype
        if torch.is_autocast_enabled("cpu"):
            dtypes = torch.float32, torch.float32
        if not is_supported(sequence, first, params, dtypes):
            return None
        return dispatch.DeferredCall(
            _run_in_dtypes, (sequence, first, dtypes, params, options, kernel, on_failure)
        )

    return dispatch.override_operators(
        {"gru.input": gru_input}, "AutogradCPU", "CPU", on_failure=on_failure, may_rest=True
    )


def _run_in_dtypes(
    sequence: torch.Tensor,
    first: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast the tensors to other dtypes, call ``gru``, and cast the results back."""
    with torch.autocast("cpu", enabled=False):
        output, last_states = gru(sequence.to(dtypes[0]), first.to(dtypes[1]), *rest)
    return output.to(sequence.dtype), last_states.to(first.dtype)


def is_supported(
    sequence: torch.Tensor,
    first: torch.Tensor,
    params: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
) -> bool:
    """Whether these are plain tensors, not transformed, of a GRU that is not too wide, and whether
    all of them are float32 after the casts to ``dtypes``."""
    return (
        dispatch.may_use_kernel(sequence, first, *params)
        and all(dtype is torch.float32 for dtype in (*dtypes, *(x.dtype for x in params)))
        and sequence.dim() == 3
        and min(sequence.shape) > 0
        and params[1].shape[1] == first.shape[2] <= MOST_WIDTH
    )
