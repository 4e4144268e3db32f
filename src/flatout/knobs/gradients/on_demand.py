"""Gradients put off until somebody asks for them.

What holds at any time: the gradient of a parameter is what torch keeps for it, and what the calls
that owe it one would add. ``zero_grad``, or another gradient in its place, cancels the debt, and
whoever reads ``Parameter.grad`` has it paid first. So nothing but time depends on whether the
forecast is right, that what was always dropped unread will be again.

A backward call is known again by the parameters that it reaches and by the optimizer that stepped
before it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward as run_backward
from torch.autograd.graph import get_gradient_edge

from flatout.agent.capture import is_capturing
from flatout.agent.finite import kept_gradient
from flatout.agent.place import take_place
from flatout.knobs import Undo

_autograd: Any = torch.autograd

TIMES_DROPPED = 2
"""After which a gradient that was never read is put off."""

MOST_OPEN = 2
"""Backward calls that may owe gradients at a time; each keeps its graph."""

MOST_FATES = 64
"""Kinds of backward calls that are told apart."""

CALLS_WITHOUT_USE = 64
"""Backward calls in a row that put nothing off, after which no more are looked at."""

Leaves = dict[int, Any]
"""By identity: tensors compare by their elements."""


@dataclass(eq=False)
class Fate:
    """What became of the gradients of one backward call, all the times that it was made.

    Attributes:
        times_dropped: without having been read, by the identity of the leaf.
        read: the leaves whose gradients somebody has asked for.
        can_be_late: whether those that are dropped could be computed after steps with the others;
            ``None``: not seen yet.
    """

    times_dropped: Counter[int] = field(default_factory=Counter)
    read: set[int] = field(default_factory=set)
    can_be_late: bool | None = None

    def is_dropped(self, identity: int) -> bool:
        """Whether the gradient of a parameter was always dropped unread."""
        return identity not in self.read and self.times_dropped[identity] >= TIMES_DROPPED


@dataclass(eq=False)
class Call:
    """A backward call.

    Attributes:
        outputs, grads: that it begins with.
        fate: of the gradients of all calls like it.
        wanted, put_off: the leaves that get their gradients now, and those that are owed them.
    """

    outputs: Any
    grads: Any
    fate: Fate
    wanted: Leaves
    put_off: Leaves


class OnDemand:
    """Stands between the program and its gradients.

    Args:
        on_skip: called with the reason why nothing is put off any more.
        on_failure: called when something here failed; all gradients are computed then.
    """

    def __init__(
        self, on_skip: Callable[[str], None], on_failure: Callable[[Exception], None]
    ) -> None:
        self._on_skip = on_skip
        self._on_failure = on_failure
        self._fates: defaultdict[tuple[frozenset[int], int], Fate] = defaultdict(Fate)
        self._unread: dict[int, set[Fate]] = {}
        self._open: list[Call] = []
        self._last_optimizer = 0
        self._calls_without_use = 0
        self._is_over = False
        self._depth = 0
        self._installed: Any = None

    def install(self) -> Undo:
        """Begin, or go on; the undo pays what is owed."""
        own = _autograd._engine_run_backward

        def backward(outputs: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
            if self._installed is not backward or self._is_over or self._depth:
                return own(outputs, grads, *args, **kwargs)
            self._depth += 1
            try:
                return self._backward(own, outputs, grads, args, kwargs)
            finally:
                self._depth -= 1

        self._installed = _autograd._engine_run_backward = backward
        undos = (
            self._take_gradients(),
            self._take_zero_grad(torch.optim.Optimizer, _members),
            self._take_zero_grad(torch.nn.Module, torch.nn.Module.parameters),
            self._take_hooks(),
        )

        def undo() -> None:
            self._installed = None
            if _autograd._engine_run_backward is backward:
                _autograd._engine_run_backward = own
            try:
                self._pay(list(self._open))
            finally:
                self._unread.clear()
                for give_back in undos:
                    give_back()

        return undo

    def stepped(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self._last_optimizer = id(optimizer)

    # Backward

    def _backward(self, own: Any, outputs: Any, grads: Any, args: Any, kwargs: Any) -> Any:
        try:
            call = self._forecast(outputs, grads, args, kwargs)
        except Exception as error:  # noqa: BLE001 - reported
            self._is_over = True
            self._on_failure(error)
            call = None
        if call is None:
            return own(outputs, grads, *args, **kwargs)
        if call.put_off:
            keep_graph, create_graph = True, False
            wanted = tuple(call.wanted.values())
            result = own(outputs, grads, keep_graph, create_graph, wanted, **kwargs)
            self._open.append(call)
        else:
            result = own(outputs, grads, *args, **kwargs)
        for identity in call.wanted:
            self._unread.setdefault(identity, set()).add(call.fate)
        return result

    def _forecast(self, outputs: Any, grads: Any, args: Any, kwargs: Any) -> Call | None:
        """What to do in a backward call; ``None`` for one that is left alone."""
        keep_graph, create_graph, inputs = args
        if keep_graph or create_graph or inputs or not kwargs.get("accumulate_grad"):
            return None
        leaves = None if is_capturing() else _leaves(outputs)
        if leaves is None:
            return None
        fate = self._fates[frozenset(leaves), self._last_optimizer]
        put_off: Leaves = {}
        if len(self._open) < MOST_OPEN:
            dropped = {i: leaf for i, leaf in leaves.items() if fate.is_dropped(i)}
            put_off = {i: leaf for i, leaf in dropped.items() if _can_wait(leaf)}
        if len(put_off) == len(leaves):
            put_off = {}  # a call for nobody; to torch, no inputs would mean all of them
        if put_off and fate.can_be_late is None:
            fate.can_be_late = _can_be_late(outputs, put_off)
        if not fate.can_be_late:
            put_off = {}
        self._calls_without_use = 0 if put_off else self._calls_without_use + 1
        if self._calls_without_use >= CALLS_WITHOUT_USE:
            self._end(f"no gradient was dropped unread in {CALLS_WITHOUT_USE} backward calls")
        elif len(self._fates) > MOST_FATES:
            self._end("its backward calls reach other parameters again and again")
        wanted = {i: leaf for i, leaf in leaves.items() if i not in put_off}
        return Call(outputs, grads, fate, wanted, put_off)

    def _end(self, why: str) -> None:
        """Put nothing off from now on; what is owed stays so."""
        if not self._is_over:
            self._is_over = True
            self._fates.clear()
            self._unread.clear()
            self._on_skip(why)

    # Gradients

    def _pay(self, calls: Iterable[Call]) -> None:
        """Compute all that these calls owe.

        Raises:
            RuntimeError: what it is computed from has been changed meanwhile.
        """
        for call in calls:
            leaves, call.put_off = call.put_off, {}
            self._open.remove(call)
            for identity in leaves:
                self._unread.setdefault(identity, set()).add(call.fate)
            keep_graph = create_graph = False
            try:
                run_backward(
                    *(call.outputs, call.grads, keep_graph, create_graph, tuple(leaves.values())),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
            except RuntimeError as error:
                raise RuntimeError(
                    "a gradient that flatout has put off is asked for after all, and what it is "
                    "computed from has been changed meanwhile: run without gradients=on_demand"
                ) from error

    def _drop(self, leaves: Iterable[Any]) -> None:
        """Their gradients are being dropped: what is owed to them is not wanted any more."""
        for identity in map(id, leaves):
            for call in self._open:
                call.put_off.pop(identity, None)
            for fate in self._unread.pop(identity, ()):
                fate.times_dropped[identity] += 1
        self._open = [call for call in self._open if call.put_off]

    def _is_owed(self, leaf: Any) -> bool:
        return any(id(leaf) in call.put_off for call in self._open)

    def _read(self, leaf: Any) -> Any:
        identity = id(leaf)
        if self._open:
            self._pay([call for call in self._open if identity in call.put_off])
        for fate in self._unread.pop(identity, ()):
            fate.read.add(identity)
        return kept_gradient.__get__(leaf)

    def _write(self, leaf: Any, gradient: Any) -> None:
        kept_gradient.__set__(leaf, gradient)
        self._drop([leaf])

    def _delete(self, leaf: Any) -> None:
        kept_gradient.__delete__(leaf)
        self._drop([leaf])

    # Places

    def _take_gradients(self) -> Undo:
        parameter: Any = torch.nn.Parameter
        taken = property(self._read, self._write, self._delete, kept_gradient.__doc__)
        parameter.grad = taken

        def undo() -> None:
            if parameter.__dict__.get("grad") is taken:
                del parameter.grad

        return undo

    def _take_zero_grad(self, owner: Any, leaves_of: Callable[[Any], Iterable[Any]]) -> Undo:
        own = owner.__dict__["zero_grad"]

        def zero_grad(owning: Any, set_to_none: bool = True) -> None:
            leaves = list(leaves_of(owning))
            unmade = [] if set_to_none else [leaf for leaf in leaves if self._is_owed(leaf)]
            self._drop(leaves)
            own(owning, set_to_none=set_to_none)
            for leaf in unmade:
                if kept_gradient.__get__(leaf) is None:
                    kept_gradient.__set__(leaf, torch.zeros_like(leaf))

        return take_place(owner, "zero_grad", zero_grad)

    def _take_hooks(self) -> Undo:
        """What hangs on a tensor between must be called, and does not show in the graph."""
        tensor: Any = torch.Tensor
        own_register, own_retain = tensor.register_hook, tensor.retain_grad

        def see(hooked: Any) -> None:
            if not hooked.is_leaf:
                self._end("the program hangs hooks on what lies between its parameters and losses")

        def register_hook(hooked: Any, hook: Any) -> Any:
            see(hooked)
            return own_register(hooked, hook)

        def retain_grad(hooked: Any) -> None:
            see(hooked)
            own_retain(hooked)

        give_back = take_place(tensor, "register_hook", register_hook)
        tensor.retain_grad = retain_grad

        def undo() -> None:
            give_back()
            if tensor.__dict__.get("retain_grad") is retain_grad:
                del tensor.retain_grad

        return undo


def _members(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _leaves(outputs: Iterable[Any]) -> Leaves | None:
    """The leaves that a backward call reaches; ``None`` where something on the way may have to be
    called for its own sake."""
    leaves: Leaves = {}
    for node, _ in _edges(outputs):
        if node is None:
            return None
        if type(node) is _ACCUMULATION:
            leaves[id(node.variable)] = node.variable
        elif isinstance(node, BackwardCFunction) and not _is_ours(node):
            return None
    return leaves


def _edges(outputs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """All nodes that a backward call reaches, each with all those it is reached from (``None``
    for an output)."""
    edges = [(getattr(output, "grad_fn", None), None) for output in outputs]
    seen = set()
    while edges:
        yield (edge := edges.pop())
        node = edge[0]
        if node is not None and node not in seen:
            seen.add(node)
            edges += [(following, node) for following, _ in node.next_functions if following]


def _can_be_late(outputs: Iterable[Any], put_off: Leaves) -> bool:
    """Whether no weight that takes part in the gradients put off is itself stepped with."""
    parents: defaultdict[Any, list[Any]] = defaultdict(list)
    for node, parent in _edges(outputs):
        if parent is not None:
            parents[node].append(parent)

    def above(nodes: Iterable[Any], passes: Callable[[Any], bool]) -> set[Any]:
        """The nodes that lead to these, as far up as they are passed."""
        found: set[Any] = set()
        left = list(nodes)
        while left:
            for parent in parents[left.pop()]:
                if parent not in found:
                    found.add(parent)
                    if passes(parent):
                        left.append(parent)
        return found

    ends = [node for node in parents if type(node) is _ACCUMULATION]
    late = [node for node in ends if id(node.variable) in put_off]
    others = [node for node in ends if id(node.variable) not in put_off]
    return above(late, lambda node: True).isdisjoint(above(others, _is_view))


def _is_view(node: Any) -> bool:
    return type(node).__name__.rstrip("0123456789") in _VIEWS


_VIEWS = {
    f"{name}Backward"
    for name in (
        *("Alias", "AsStrided", "Detach", "Diagonal", "Expand", "Narrow", "Permute", "Reshape"),
        *("ReshapeAlias", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "T"),
        *("Transpose", "Unbind", "Unfold", "Unsqueeze", "UnsafeView", "View", "ViewAsComplex"),
        "ViewAsReal",
    )
}
"""The classes of nodes whose output lies in the memory of their input."""

_ACCUMULATION: Any = type(get_gradient_edge(torch.zeros((), device="cpu", requires_grad=True)).node)
"""The class of the nodes that add to the gradients of leaves."""


def _is_ours(node: Any) -> bool:
    forward = getattr(type(node), "_forward_cls", None)
    return getattr(forward, "__module__", "").startswith("flatout.")


def _can_wait(leaf: Any) -> bool:
    """Whether ``Parameter.grad`` is the only way to the gradient of a leaf."""
    is_parameter = torch.nn.Parameter in type(leaf).__mro__
    return is_parameter and not leaf._backward_hooks and not leaf._post_accumulate_grad_hooks
