"""Defer gradients that were always discarded unread, until they are read or discarded.

Invariant: the gradient of a parameter is the one that torch stores, plus those that deferred
backward calls would have accumulated into it. ``zero_grad``, or assigning another gradient,
discards the deferred ones. Reading ``Parameter.grad`` computes them first, and so does a backward
call that is about to accumulate into the same gradient. So a wrong prediction, that a gradient
which was always discarded unread will be discarded again, costs time but changes no result.

Backward calls are grouped into kinds, by the parameters that they reach and by the optimizer that
stepped before them.

A deferred gradient is the one that the call itself would have computed: the tensors that backward
reads are kept unchanged (``kept.py``), and the settings of torch that its kernels depend on are
restored (``surroundings.py``).
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import _HookMixin
from torch.autograd.graph import _engine_run_backward as run_backward
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from flatout.intercept import graph, handled_calls, objects
from flatout.intercept.callbacks import BackwardWrapper, CallbackList
from flatout.intercept.containment import OnFailure, attempt, wrap
from flatout.intercept.gradients import stored_gradient
from flatout.intercept.modes import autocast_devices, without_autocast
from flatout.intercept.patch import Undo, add_attribute, replace_function, wrap_function
from flatout.knobs.gradients import surroundings
from flatout.knobs.gradients.kept import SavedTensors, is_known, is_of_program

_torch: Any = torch
_autograd: Any = torch.autograd

TIMES_DISCARDED = 2
"""A gradient that was never read is deferred once it has been discarded this often."""

MOST_PENDING = 2
"""Maximum number of deferred backward calls at a time; each of them keeps its graph alive."""

OLDEST = 8
"""A deferred call is computed after this many later backward calls, so that its graph is freed."""

MOST_KINDS = 64
"""Nothing is deferred any more once there have been more kinds of backward calls than this."""

CALLS_WITHOUT_USE = 256
"""Nothing is deferred any more after this many backward calls in a row without a deferred one."""

MOST_FORCED = 2
"""Calls of a kind are no longer deferred after this many of them were computed without being
read."""

Leaves = dict[int, Any]
"""Leaves by identity, because tensors compare by their elements."""


@dataclass(eq=False)
class History:
    """What has happened to the gradients of one kind of backward call.

    Attributes:
        times_discarded: how often the gradient of a leaf was discarded unread, by its identity.
        read: the identities of the leaves whose gradients have been read.
        times_forced: how often a deferred call was computed although nothing read its gradients.
    """

    times_discarded: Counter[int] = field(default_factory=Counter)
    read: set[int] = field(default_factory=set)
    times_forced: int = 0

    def is_discarded(self, identity: int) -> bool:
        """Whether the gradient of a leaf was always discarded unread, and often enough."""
        return identity not in self.read and self.times_discarded[identity] >= TIMES_DISCARDED


@dataclass(eq=False)
class Deferred:
    """The part of a backward call that has been deferred.

    Attributes:
        edges: the edges of the graph at which the call begins, which the program cannot change;
            empty once the gradients cannot be computed any more.
        grads: copies of the gradients of the call's outputs.
        saved: the tensors that the graph's nodes read.
        settings: the settings of torch at the time of the call.
        history: the history of this kind of call.
        leaves: the leaves whose gradients are deferred.
        age: the number of backward calls since.
        error: why the gradients cannot be computed any more.
    """

    edges: tuple[Any, ...]
    grads: tuple[Any, ...]
    saved: SavedTensors
    settings: tuple[Any, ...]
    history: History
    leaves: Leaves
    age: int = 0
    error: Exception | None = None


@dataclass(frozen=True)
class Prediction:
    """Which gradients of a backward call to compute, and which to defer.

    Attributes:
        history: the history of this kind of call.
        needed: the leaves whose gradients are computed now.
        to_defer: the leaves whose gradients are deferred.
        deferred_nodes: the nodes of the graph that lead to the deferred leaves.
        other_nodes: all other nodes of the graph.
    """

    history: History
    needed: Leaves
    to_defer: Leaves
    deferred_nodes: list[Any]
    other_nodes: list[Any]


class OnDemand:
    """Defers gradients of backward calls, and computes them when they are read.

    Args:
        backward_wrappers: the host's wrappers around backward calls.
        on_skip: called with the reason when nothing is deferred any more.
        on_failure: called with the exception when code of this class fails; all gradients are then
            computed.
    """

    def __init__(
        self,
        backward_wrappers: CallbackList[BackwardWrapper],
        on_skip: Callable[[str], None],
        on_failure: OnFailure,
    ) -> None:
        self._backward_wrappers = backward_wrappers
        self._on_skip = on_skip
        self._on_failure = on_failure
        self._histories: defaultdict[tuple[frozenset[int], int], History] = defaultdict(History)
        self._unread: dict[int, set[History]] = {}
        self._pending: list[Deferred] = []
        self._last_optimizer = 0
        self._calls_without_use = 0
        self._is_applied = False
        self._has_stopped = False
        self._depth = 0
        self._thread: int | None = None
        self._replacements = contextlib.ExitStack()
        self._is_installed = False
        _instances.add(self)

    def install(self) -> Undo:
        """Replace torch's functions and defer gradients from now on; returns the undo.

        The undo computes all deferred gradients. If some cannot be computed any more, torch's
        functions stay replaced until the program discards these gradients.
        """
        self._is_applied = True
        if not self._is_installed and not self._has_stopped:
            self._is_installed = True
            self._replacements.callback(
                self._backward_wrappers.append(self._wrap_backward, self._handle_failure)
            )
            self._replace_grad()
            self._replace_zero_grad(torch.optim.Optimizer, _optimizer_params)
            self._replace_zero_grad(torch.nn.Module, _module_params)
            self._replace_hook_functions()
            self._replace_scaler()

        def undo() -> None:
            self._is_applied = False
            self._compute_all()
            self._unread.clear()
            self._uninstall_if_idle()

        return undo

    def stepped(self, optimizer: Any) -> None:
        """Note that an optimizer has stepped."""
        self._last_optimizer = id(optimizer)

    @property
    def _is_idle(self) -> bool:
        """Whether there is nothing to do: nothing is deferred now, and nothing will be."""
        return (not self._is_applied or self._has_stopped) and not self._pending

    def _uninstall_if_idle(self) -> None:
        if self._is_idle and not self._depth:
            self._is_installed = False
            self._replacements.close()

    # Backward

    def _backward(self, original: Any, outputs: Any, grads: Any, args: Any, kwargs: Any) -> Any:
        prediction = None
        if self._is_applied and not self._has_stopped:
            prediction = attempt(self._stop_after_error, self._predict, outputs, grads, args)
            if prediction is None or not prediction.to_defer:
                self._count_call_without_use()
        self._compute_before(prediction)
        if prediction is None:
            return original(outputs, grads, *args, **kwargs)
        if not prediction.to_defer:
            result = original(outputs, grads, *args, **kwargs)
        else:
            result = self._backward_in_part(original, outputs, grads, kwargs, prediction)
        for identity in prediction.needed:
            self._unread.setdefault(identity, set()).add(prediction.history)
        return result

    def _backward_in_part(
        self, original: Any, outputs: Any, grads: Any, kwargs: Any, prediction: Prediction
    ) -> Any:
        """Run backward for the gradients that are needed, and defer the others."""
        self._calls_without_use = 0
        saved = SavedTensors()
        deferred = Deferred(
            edges=tuple(map(get_gradient_edge, outputs)),
            grads=tuple(grad.clone() for grad in grads),
            saved=saved,
            settings=surroundings.save(),
            history=prediction.history,
            leaves=prediction.to_defer,
        )
        keep_graph, create_graph = True, False
        inputs = tuple(prediction.needed.values())
        result = original(outputs, grads, keep_graph, create_graph, inputs, **kwargs)
        self._pending.append(deferred)
        handled_calls.counts["gradients"] += 1
        is_saved = attempt(
            self._stop_after_error, saved.take, prediction.deferred_nodes, prediction.other_nodes
        )
        if not (is_saved and self._is_applied):  # the knob may have been undone during the call
            self._compute(deferred)
        return result

    def _predict(self, outputs: Any, grads: Any, args: Any) -> Prediction | None:
        """Predict which gradients of a backward call are discarded; ``None``: leave it alone."""
        keep_graph, create_graph, inputs = args
        if keep_graph or create_graph or inputs:
            return None
        if is_distributed():
            self._stop("training is distributed: other processes wait for these gradients")
            return None
        if any(map(torch.is_autocast_enabled, autocast_devices())):
            return None
        if any(grad is None or grad.is_inference() for grad in grads):
            return None
        if torch.is_anomaly_enabled() or torch._C._len_torch_dispatch_stack():
            return None  # the program observes what backward computes
        edges = list(graph.edges(outputs))
        leaves = _find_leaves(edges)
        if leaves is None or any(map(_has_hooks, leaves.values())):
            return None
        parameters = frozenset(i for i, leaf in leaves.items() if _is_parameter(leaf))
        history = self._histories[parameters, self._last_optimizer]
        if len(self._histories) > MOST_KINDS:
            self._stop("its backward calls reach other parameters again and again")
        to_defer: Leaves = {}
        if len(self._pending) < MOST_PENDING and history.times_forced < MOST_FORCED:
            discarded = {i: leaf for i, leaf in leaves.items() if history.is_discarded(i)}
            to_defer = {i: leaf for i, leaf in discarded.items() if _can_be_deferred(leaf)}
        if len(to_defer) == len(leaves):
            to_defer = {}  # without any inputs, torch's backward would compute all gradients
        nodes = _nodes_towards(edges, to_defer) if to_defer else set()
        if not (nodes and all(map(is_known, nodes)) and all(map(SavedTensors.are_readable, nodes))):
            to_defer = {}
        other_nodes = {node for node, _ in edges} - nodes if to_defer else ()
        needed = {i: leaf for i, leaf in leaves.items() if i not in to_defer}
        return Prediction(history, needed, to_defer, list(nodes), list(other_nodes))

    def _count_call_without_use(self) -> None:
        self._calls_without_use += 1
        if self._calls_without_use >= CALLS_WITHOUT_USE:
            self._stop(f"nothing could be deferred in {CALLS_WITHOUT_USE} backward calls")

    def _stop(self, why: str) -> None:
        """Defer nothing from now on; what is deferred already stays deferred."""
        if not self._has_stopped:
            self._has_stopped = True
            self._histories.clear()
            self._unread.clear()
            self._on_skip(why)

    def _stop_after_error(self, error: Exception) -> None:
        """Defer nothing from now on, because code of this class has failed."""
        self._has_stopped = True
        self._on_failure(error)

    # Deferred gradients

    def _compute_before(self, prediction: Prediction | None) -> None:
        """Compute deferred gradients into which a backward call will accumulate, and old ones.

        Args:
            prediction: of the call that is about to begin; ``None``: it may reach any leaf.
        """
        for deferred in list(self._pending):
            deferred.age += 1
            is_reached = prediction is None or not deferred.leaves.keys().isdisjoint(
                prediction.needed
            )
            if is_reached or deferred.age > OLDEST:
                deferred.history.times_forced += 1
                self._compute(deferred)

    def _compute_all(self) -> None:
        for deferred in list(self._pending):
            self._compute(deferred)

    def _compute(self, deferred: Deferred) -> None:
        """Compute the gradients of a deferred call.

        If that fails, the error is kept, and raised only if one of the gradients is read.

        Raises:
            BaseException: the program was interrupted meanwhile; the gradients are lost as well.
        """
        is_pending = deferred in self._pending
        for earlier in self._pending[: self._pending.index(deferred)] if is_pending else ():
            if not earlier.leaves.keys().isdisjoint(deferred.leaves):
                self._compute(earlier)
        if deferred not in self._pending or deferred.error is not None:
            return
        leaves = list(deferred.leaves.values())
        frozen = [leaf for leaf in leaves if not leaf.requires_grad]
        keep_graph = create_graph = False
        self._depth += 1
        try:
            for leaf in frozen:  # torch accumulates nothing into leaves that require no gradient
                leaf.requires_grad_(True)
            with (
                torch.inference_mode(False),
                without_autocast(),
                surroundings.restored(deferred.settings),
                deferred.saved.readable(),
            ):
                run_backward(
                    *(deferred.edges, deferred.grads, keep_graph, create_graph, tuple(leaves)),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        except BaseException as error:
            # A new exception, because the frames of this one would keep the graph alive.
            deferred.error = RuntimeError(f"{type(error).__name__}: {error}")
            deferred.edges = deferred.grads = ()
            if not isinstance(error, RuntimeError):
                raise
        else:
            self._pending.remove(deferred)
            for identity in deferred.leaves:
                self._unread.setdefault(identity, set()).add(deferred.history)
        finally:
            deferred.saved.release()
            self._depth -= 1
            for leaf in frozen:
                leaf.requires_grad_(False)

    def _discard(self, leaves: Iterable[Any]) -> None:
        """Discard the deferred gradients of leaves whose gradients are about to be discarded."""
        for leaf in leaves:
            identity = id(leaf)
            for deferred in self._pending:
                deferred.leaves.pop(identity, None)
            histories = self._unread.pop(identity, ())
            if histories and _is_sparse(leaf):
                continue  # it would be unknown whether zeros for it are to be sparse
            for history in histories:
                history.times_discarded[identity] += 1
        for deferred in [deferred for deferred in self._pending if not deferred.leaves]:
            self._pending.remove(deferred)
            deferred.saved.release()
        self._uninstall_if_idle()

    def _deferred_for(self, leaf: Any) -> list[Deferred]:
        return [deferred for deferred in self._pending if id(leaf) in deferred.leaves]

    def _read(self, original: Callable[[Any], Any], leaf: Any) -> Any:
        """Replaces the getter of ``Parameter.grad``."""
        for deferred in self._deferred_for(leaf):
            self._compute(deferred)
        for history in self._unread.pop(id(leaf), ()):
            history.read.add(id(leaf))
        gradient = original(leaf)
        self._uninstall_if_idle()
        return gradient

    def _get_computed(self, leaf: Any) -> Any:
        """The gradient that torch stores, after the deferred ones have been computed.

        Raises:
            RuntimeError: a deferred gradient cannot be computed any more.
        """
        for deferred in self._pending:
            if id(leaf) in deferred.leaves:
                raise RuntimeError(
                    "flatout has deferred a gradient that the program now reads, and it cannot be "
                    "computed any more: run without gradients=on_demand"
                ) from deferred.error
        return stored_gradient.__get__(leaf)

    def _write(self, original: Callable[[Any, Any], None], leaf: Any, gradient: Any) -> None:
        original(leaf, gradient)
        self._discard([leaf])

    def _delete(self, original: Callable[[Any], None], leaf: Any) -> None:
        original(leaf)
        self._discard([leaf])

    def _forget_deferred(self, leaf: Any) -> None:
        """Discard the deferred gradients of a leaf, without noting that they were discarded."""
        for deferred in self._pending:
            deferred.leaves.pop(id(leaf), None)

    # Replacements of torch's functions

    def _wrap_backward(
        self, original: Any, outputs: Any, grads: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if self._is_idle or not kwargs.get("accumulate_grad") or self._depth:
            return original(outputs, grads, *args, **kwargs)
        if self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            self._stop("its backward calls come from several threads")
        self._depth += 1
        try:
            return self._backward(original, outputs, grads, args, kwargs)
        finally:
            self._depth -= 1
            self._uninstall_if_idle()

    def _handle_failure(self, error: Exception) -> None:
        """Called when a replacement of torch's functions has failed."""
        self._stop_after_error(error)
        self._compute_all()

    def _replace_grad(self) -> None:
        def set_stored(leaf: Any, gradient: Any) -> None:
            stored_gradient.__set__(leaf, gradient)
            self._forget_deferred(leaf)

        def delete_stored(leaf: Any) -> None:
            stored_gradient.__delete__(leaf)
            self._forget_deferred(leaf)

        replacement = property(
            wrap(self._handle_failure, self._read, self._get_computed),
            wrap(self._handle_failure, self._write, set_stored),
            wrap(self._handle_failure, self._delete, delete_stored),
            stored_gradient.__doc__,
        )
        for name in ("grad", "_grad"):
            self._replacements.callback(add_attribute(torch.nn.Parameter, name, replacement))

    def _replace_zero_grad(self, owner: Any, leaves_of: Callable[[Any], Iterable[Any]]) -> None:
        def zero_grad(original: Any, instance: Any, set_to_none: bool = True) -> None:
            leaves = list(leaves_of(instance))
            need_zeros = [] if set_to_none else [x for x in leaves if self._deferred_for(x)]
            self._discard(leaves)
            original(instance, set_to_none=set_to_none)
            for leaf in need_zeros:
                if stored_gradient.__get__(leaf) is None:
                    stored_gradient.__set__(leaf, torch.zeros_like(leaf))

        function = wrap(self._handle_failure, zero_grad, owner.__dict__["zero_grad"])
        if owner is torch.optim.Optimizer:  # torch disables dynamo for this one
            function = _torch._disable_dynamo(function)
        self._replacements.callback(replace_function(owner, "zero_grad", function))

    def _replace_hook_functions(self) -> None:
        """Notice hooks of the program, because they cannot be found by walking the graph."""
        tensor: Any = torch.Tensor
        original_retain_grad = tensor.retain_grad

        def note_hook(hooked: Any) -> None:
            if hooked.is_leaf:
                for deferred in self._deferred_for(hooked):
                    self._compute(deferred)
            else:
                note_inner_hook()

        def note_inner_hook() -> None:
            self._stop("the program registers hooks inside the graph")
            self._compute_all()  # the hook must not be called for earlier backward calls

        def register(original: Any, hooked: Any, hook: Any) -> Any:
            note_hook(hooked)
            return original(hooked, hook)

        def register_on_node(original: Any, hooks: Any, hook: Any) -> Any:
            note_inner_hook()
            return original(hooks, hook)

        def retain_grad(hooked: Any) -> None:
            attempt(self._handle_failure, note_hook, hooked)
            original_retain_grad(hooked)

        def enter(original: Any, hooks: Any) -> Any:
            self._stop("the program has hooks on saved tensors, as activation checkpoints do")
            return original(hooks)

        failed = self._handle_failure
        on_node = wrap(failed, register_on_node, _HookMixin._register_hook)
        for undo in (
            wrap_function(tensor, "register_hook", failed, register),
            wrap_function(tensor, "register_post_accumulate_grad_hook", failed, register),
            add_attribute(tensor, "retain_grad", retain_grad),
            replace_function(_HookMixin, "_register_hook", staticmethod(on_node)),
            wrap_function(saved_tensors_hooks, "__enter__", failed, enter),
        ):
            self._replacements.callback(undo)

    def _replace_scaler(self) -> None:
        """Notice loss scaling, because the scale is saved in the graph and changed in place."""

        def scale(original: Any, scaler: Any, outputs: Any) -> Any:
            if scaler.is_enabled():
                self._stop("the program scales its losses")
            return original(scaler, outputs)

        self._replacements.callback(
            wrap_function(torch.amp.GradScaler, "scale", self._handle_failure, scale)
        )


_instances: weakref.WeakSet[OnDemand] = weakref.WeakSet()


def _compute_before_fork() -> None:
    """Compute all deferred gradients, because autograd's threads do not exist in a forked child."""
    for on_demand in list(_instances):
        on_demand._compute_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_compute_before_fork)


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _module_params(module: torch.nn.Module) -> Iterable[Any]:
    """The parameters that ``Module.zero_grad`` zeroes; none if the module overrides this choice."""
    originals = torch.nn.Module.__dict__
    names = ("parameters", "named_parameters", "named_modules", "_named_members")
    if any(inspect.getattr_static(module, name, None) is not originals[name] for name in names):
        return ()
    return objects.parameters(module)


def _optimizer_params(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _find_leaves(edges: Iterable[tuple[Any, Any]]) -> Leaves | None:
    """The leaves of a graph; ``None`` if a node of the program may have side effects."""
    leaves: Leaves = {}
    for node, _ in edges:
        if node is None or is_of_program(node):
            return None
        leaf = graph.leaf_of(node)
        if leaf is not None and leaf.requires_grad:  # torch skips leaves frozen since the forward
            leaves[id(leaf)] = leaf
    return leaves


def _nodes_towards(edges: Iterable[tuple[Any, Any]], leaves: Leaves) -> set[Any]:
    """The nodes of a graph that lead to some of its leaves, and those of the leaves themselves."""
    parents: defaultdict[Any, list[Any]] = defaultdict(list)
    for node, parent in edges:
        parents[node].append(parent)
    remaining = [node for node in parents if id(graph.leaf_of(node)) in leaves]
    nodes = set(remaining)
    while remaining:
        for parent in parents[remaining.pop()]:
            if parent is not None and parent not in nodes:
                nodes.add(parent)
                remaining.append(parent)
    return nodes


def _can_be_deferred(leaf: Any) -> bool:
    """Whether the program can reach the gradient of a leaf only through ``Parameter.grad``."""
    if stored_gradient.__get__(leaf) is None:
        return _is_parameter(leaf)
    is_held = _is_sparse(leaf) or _count_references(leaf) > _FEWEST_REFERENCES
    return _is_parameter(leaf) and not is_held


def _has_hooks(leaf: Any) -> bool:
    """Whether a hook of the leaf may read gradients while backward runs."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


def _is_parameter(leaf: Any) -> bool:
    return torch.nn.Parameter in type(leaf).__mro__


def _count_references(leaf: Any) -> int:
    """How many references there are to the stored gradient of a leaf, in Python and in C++, and to
    its memory."""
    gradient = stored_gradient.__get__(leaf)
    uses: int = _torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    return sys.getrefcount(gradient) + int(gradient._use_count()) + uses


def _make_leaf_with_gradient() -> Any:
    leaf = torch.zeros(1, device="cpu", requires_grad=True)
    stored_gradient.__set__(leaf, torch.zeros(1, device="cpu"))
    return leaf


_FEWEST_REFERENCES = _count_references(_make_leaf_with_gradient())
"""The number of references if the program has none of its own, through which it would see what
torch accumulates."""


def _is_sparse(leaf: Any) -> bool:
    gradient = stored_gradient.__get__(leaf)
    return gradient is not None and gradient.layout is not torch.strided
