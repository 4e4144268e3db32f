"""Turns what Dynamo has captured of a call into two lists of operators, for ``kernels/replay.cpp``.

Dynamo gives the operators of the call, and guards that tell when they are valid. AOTAutograd traces
the backward pass, with the formulas and the order of autograd. Nothing is decomposed, fused or
computed again, so that the lists make the very calls that autograd would make.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import default_partition
from torch._guards import TracingContext

from flatout.intercept.identity import WeakIdentityDict

NOTHING = -1

VIEWS = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        *("alias", "as_strided", "detach", "diagonal", "expand", "narrow", "permute", "select"),
        *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold"),
        *("unsqueeze", "view", "_unsafe_view", "_reshape_alias", "chunk", "view_as_real"),
    )
)
"""Operators whose result shares its memory with their first argument."""


_PYTHON_FORMS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
"""Where torch registers, in Python, what some operators consist of while they are traced. Without
tracing, they consist of other operators, which round elsewhere or draw other random numbers."""


_TRACED_THROUGH = ("autograd_function_apply",)
"""Calls of whole functions that are traced through: a program's own ``autograd.Function``, whose
backward is traced as it is written."""


class NotCapturedError(Exception):
    """A call cannot be captured; the message is a clause that says why."""


Specialise = Callable[[Collection[int]], Any]
"""Returns a pass whose backward is given the gradients of some outputs only, by their numbers."""

specialisations: WeakIdentityDict[Any, Specialise] = WeakIdentityDict()
"""How each pass is made for the gradients of some of its outputs."""


def capture(native: ModuleType, captured: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Return the pass (``Pass`` of ``native``) that makes the calls of a graph, forward and back.

    It takes the inputs of the graph and returns a tuple of its outputs. It is a backend of Dynamo,
    less the first argument.

    Args:
        native: the extension ``kernels/replay.cpp``.
        captured: the graph, as captured by Dynamo.
        inputs: its inputs, as fake tensors.

    Raises:
        NotCapturedError: the graph has something else than calls of operators on plain CPU tensors
            of fixed shapes, or its outputs share memory with each other or with its inputs.
    """
    for node in captured.graph.nodes:
        is_nested = isinstance(node.target, torch._ops.HigherOrderOperator)
        if is_nested and str(node.target) not in _TRACED_THROUGH:
            raise NotCapturedError(f"it calls {node.target}")
    for value in inputs:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            raise NotCapturedError("not all of its inputs are tensors on the CPU")
    if torch.is_autocast_enabled("cpu"):
        raise NotCapturedError("it runs under autocast, which shares its casts between calls")
    found = _trace(captured, inputs)
    made = _to_pass(native, captured.forward, found)
    is_differentiable = [one.requires_grad for one in found["metadata"].output_info]

    def specialise(used: Collection[int]) -> Any:
        context = torch._guards.TracingContext(torch._guards.detect_fake_mode(inputs))
        off = torch.autocast("cpu", enabled=False)
        with torch._guards.tracing(context), torch.enable_grad(), off:
            again = _trace(_detach_unused(captured, used), inputs)
            return _to_pass(native, captured.forward, again, is_differentiable)

    specialisations[made] = specialise
    return made


def _trace(captured: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, Any]:
    """Trace a graph, forward and backward, and return both graphs with what torch tells of them."""
    found: dict[str, Any] = {}

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        found["forward"], found["backward"] = default_partition(joint, *args, **kwargs)
        return found["forward"], found["backward"]

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        context = TracingContext.try_get()
        found["forward"] = gm
        found["metadata"] = None if context is None else context.fw_metadata
        return make_boxed_func(gm.forward)

    with torch._functorch.config.patch(donated_buffer=False), _as_without_tracing():
        aot_module_simplified(
            captured,
            inputs,
            fw_compiler=keep,
            bw_compiler=lambda gm, example_inputs: make_boxed_func(gm.forward),
            inference_compiler=keep,
            partition_fn=partition,
            keep_inference_input_mutations=True,
        )
    return found


def _detach_unused(captured: fx.GraphModule, used: Collection[int]) -> fx.GraphModule:
    """Return a graph in which only some outputs have gradients."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    outputs = graph.graph_copy(captured.graph, nodes)
    assert isinstance(outputs, (tuple, list))
    graph.output(
        tuple(
            graph.call_method("detach", (node,))
            if isinstance(node, fx.Node) and place not in used
            else node
            for place, node in enumerate(outputs)
        )
    )
    return fx.GraphModule(captured, graph)


@contextlib.contextmanager
def _as_without_tracing() -> Iterator[None]:
    """Let operators consist of what they consist of without tracing."""
    removed = []
    try:
        for op in _operators_with_python_forms():
            for key in _PYTHON_FORMS:
                if key in op.py_kernels:
                    removed.append((op, key, op.py_kernels.pop(key)))
            op._dispatch_cache.clear()
        yield
    finally:
        for op, key, function in removed:
            op.py_kernels[key] = function
            op._dispatch_cache.clear()


@functools.cache
def _operators_with_python_forms() -> tuple[Any, ...]:
    packets = (getattr(torch.ops.aten, name) for name in dir(torch.ops.aten))
    return tuple(
        op
        for packet in packets
        if isinstance(packet, torch._ops.OpOverloadPacket)
        for op in (getattr(packet, overload) for overload in packet.overloads())
        if op.py_kernels.keys() & set(_PYTHON_FORMS)
    )


def _to_pass(
    native: ModuleType,
    again: Callable[..., Any],
    found: Mapping[str, Any],
    is_differentiable: Sequence[bool] = (),
) -> Any:
    """Return the pass of two graphs.

    Args:
        native: the extension.
        again: makes the calls of the first graph under autograd.
        found: the graphs, see ``_trace``.
        is_differentiable: whether each output has gradients, also those that the graphs leave out;
            empty: as the graphs have it.
    """
    metadata, forward = found["metadata"], found["forward"]
    if metadata is None:
        raise NotCapturedError("torch tells nothing of its outputs")
    if metadata.num_mutated_inp_runtime_indices:
        raise NotCapturedError("it writes an input of which gradients are needed")
    if metadata.num_outputs_aliased or metadata.num_intermediate_bases:
        raise NotCapturedError("its outputs share memory with each other or with its inputs")
    if metadata.tokens or any(
        type(one).__name__ == "SubclassCreationMeta" for one in metadata.subclass_inp_meta
    ):
        raise NotCapturedError("it has side effects or tensors of a class of their own")
    if _casts_twice(forward):
        raise NotCapturedError("under autocast, it uses a weight several times")
    result = native.Pass()
    result.returned = len(metadata.output_info)
    result.draws_numbers = any(
        torch.Tag.nondeterministic_seeded in node.target.tags
        for node in forward.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )
    outputs = _to_list(result.forward, forward)
    if "backward" not in found:
        return result
    backward = found["backward"]
    repeated_inputs = _separate_gradients(backward)
    _to_list(result.backward, backward)
    has_gradient = [one.requires_grad for one in metadata.output_info]
    tangents = [place for place, needs in enumerate(has_gradient) if needs]
    saved = outputs[result.returned :]
    if len(_inputs_of(backward)) != len(saved) + len(tangents):
        raise NotCapturedError("its backward pass takes more than what forward has saved")
    inputs = _inputs_of(forward)
    written = {inputs[place] for place in metadata.mutated_graph_handled_indices}
    result.set_backward(
        again,
        list(is_differentiable) or has_gradient,
        tangents,
        list(metadata.mutated_graph_handled_indices),
        [int(_find_kind(node, inputs, written, outputs[: result.returned])) for node in saved],
        _find_viewed(inputs, saved, written),
        _find_used_outputs(outputs[: result.returned], saved),
        repeated_inputs,
    )
    return result


def _casts_twice(graph: fx.GraphModule) -> bool:
    """Return whether an input is cast more than once. Autocast casts a weight once, and adds up
    its gradients in the lower precision; a traced one does not."""
    casts = Counter(
        node.args[0]
        for node in graph.graph.nodes
        if node.target is torch.ops.aten._to_copy.default and node.args[0].op == "placeholder"
    )
    return any(count > 1 for count in casts.values())


def _inputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _separate_gradients(backward: fx.GraphModule) -> list[int]:
    """Let a backward graph return the gradients of each use of an input instead of their sum.

    Autograd adds up the gradients of all uses one by one, also those of several passes. The first
    stays in the place of the sum, the others come last; returns the numbers of their inputs.
    """
    output = next(node for node in backward.graph.nodes if node.op == "output")
    gradients = list(output.args[0])
    repeated = []
    for place, node in enumerate(tuple(gradients)):
        terms: list[Any] = []
        while (
            isinstance(node, fx.Node)
            and node.target is torch.ops.aten.add.Tensor
            and len(node.users) == 1
            and not node.kwargs
            and all(isinstance(term, fx.Node) for term in node.args)
        ):
            node, last = node.args
            terms.insert(0, last)
        gradients[place] = node
        gradients += terms
        repeated += [place] * len(terms)
    output.args = (tuple(gradients),)
    backward.graph.eliminate_dead_code()
    return repeated


def _to_list(calls: Any, graph: fx.GraphModule) -> list[fx.Node | None]:
    """Add the calls of a graph to a list of ``native``; returns the nodes of its outputs."""
    slots: dict[fx.Node, int] = {}
    constants: dict[fx.Node, torch.Tensor] = {}
    outputs: list[fx.Node | None] = []
    count = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if not isinstance(node.meta.get("val"), torch.Tensor):
                raise NotCapturedError("its shapes are not fixed")
            slots[node] = count
            count += 1
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constants[node] = operator.attrgetter(node.target)(graph)
        elif node.op == "output":
            outputs = list(node.args[0])
        elif node.op == "call_function" and node.target is not operator.getitem:
            if not isinstance(node.target, torch._ops.OpOverload):
                raise NotCapturedError(f"it calls {node.target}")
            results, returns_list = _find_results(node)
            numbers = []
            for result in results:
                numbers.append(NOTHING if result is None else count)
                if result is not None:
                    slots[result] = count
                    count += 1
            schema = node.target._schema
            arguments = [
                _to_argument(value, slots, constants) for value in _arguments(node, schema)
            ]
            calls.add_call(schema.name, schema.overload_name, arguments, numbers, returns_list)
    if any(node in constants for node in outputs):
        raise NotCapturedError("it returns a constant")
    calls.finish(count, [NOTHING if node is None else slots[node] for node in outputs])
    return outputs


_DEFAULT = object()


def _arguments(node: fx.Node, schema: Any) -> list[Any]:
    """Return the arguments of a call in the order of the schema; ``_DEFAULT`` where none is
    given."""
    given = list(node.args)
    return [
        given[place]
        if place < len(given) and not formal.kwarg_only
        else node.kwargs.get(formal.name, _DEFAULT)
        for place, formal in enumerate(schema.arguments)
    ]


def _to_argument(
    value: Any, slots: Mapping[fx.Node, int], constants: Mapping[fx.Node, torch.Tensor]
) -> tuple[str, Any]:
    if value is _DEFAULT:
        return "default", None
    if isinstance(value, fx.Node):
        return ("value", constants[value]) if value in constants else ("slot", slots[value])
    if isinstance(value, (list, tuple)) and any(isinstance(one, fx.Node) for one in value):
        if any(one in constants for one in value):
            raise NotCapturedError("it has a list of constants")
        return "list", [NOTHING if one is None else slots[one] for one in value]
    return "value", value


def _find_results(node: fx.Node) -> tuple[list[fx.Node | None], bool]:
    """Return the nodes that stand for the results of a call, and whether they are elements of one
    list; ``None`` stands for a result that nothing uses."""
    returns = node.target._schema.returns  # type: ignore[union-attr]
    is_list = len(returns) == 1 and isinstance(returns[0].type, torch.ListType)
    if len(returns) == 1 and not is_list:
        return [node], False
    taken: dict[Any, fx.Node] = {
        user.args[1]: user for user in node.users if user.target is operator.getitem
    }
    if len(taken) < len(node.users):
        raise NotCapturedError(f"it passes all results of {node.target} on")
    count = max(taken, default=-1) + 1 if is_list else len(returns)
    return [taken.get(place) for place in range(count)], is_list


class _Kind(enum.IntEnum):
    """What a saved output is, as ``kernels/replay.cpp`` numbers it."""

    INPUT = 0
    WRITTEN_INPUT = 1
    RETURNED = 2
    INTERMEDIATE = 3


def _find_kind(
    node: fx.Node | None,
    inputs: Sequence[fx.Node],
    written: Collection[fx.Node],
    returned: Sequence[fx.Node | None],
) -> _Kind:
    if node in written:
        return _Kind.WRITTEN_INPUT
    if node in inputs:
        return _Kind.INPUT
    return _Kind.RETURNED if node in returned else _Kind.INTERMEDIATE


def _bases(node: fx.Node | None) -> Iterator[Any]:
    """Yield a node and what it is a view of."""
    base: Any = node
    while base is not None:
        yield base
        is_view = base.op == "call_function" and (
            getattr(base.target, "overloadpacket", None) in VIEWS or base.target is operator.getitem
        )
        base = base.args[0] if is_view else None


def _find_viewed(
    inputs: Sequence[fx.Node], saved: Sequence[fx.Node | None], written: Collection[fx.Node]
) -> list[int]:
    """Return the numbers of the inputs of which backward uses a view.

    Torch counts what is written to a tensor, and refuses to compute gradients from one that has
    changed. A view that was made below autograd has a count of its own.
    """
    bases = {base for node in saved for base in list(_bases(node))[1:]}
    return [i for i, node in enumerate(inputs) if node in bases and node not in written]


def _find_used_outputs(
    returned: Sequence[fx.Node | None], saved: Sequence[fx.Node | None]
) -> list[int]:
    """Return the numbers of the returned outputs that backward uses, or views of them."""
    bases = {base for node in saved for base in _bases(node)}
    return [i for i, node in enumerate(returned) if node is not None and node in bases]
