"""Gradients put off until somebody asks for them.

What holds at any time: the gradient of a parameter is what torch keeps for it, and what the calls
that owe it one would add. ``zero_grad``, or another gradient in its place, cancels the debt.
Whoever reads ``Parameter.grad`` has it paid first, and so has a backward call that is about to add
to it. So nothing but time depends on whether the forecast is right, that what was always dropped
unread will be again.

A backward call is known again by the parameters that it reaches and by the optimizer that stepped
before it.

What is put off computes what the call would have: all that backward reads is kept as it was
(``kept.py``), whatever the program writes meanwhile, and so is the state of torch that its kernels
look at (``surroundings.py``).
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

from flatout.intercept import engagement, graph, objects
from flatout.intercept.callbacks import BackwardWrapper, CallbackList
from flatout.intercept.containment import OnFailure, attempt, wrap
from flatout.intercept.finite import stored_gradient
from flatout.intercept.modes import autocast_devices, without_autocast
from flatout.intercept.patch import Undo, add_attribute, replace_function, wrap_function
from flatout.knobs.gradients import surroundings
from flatout.knobs.gradients.kept import Kept, is_known, is_of_program

_torch: Any = torch
_autograd: Any = torch.autograd

TIMES_DROPPED = 2
"""After which a gradient that was never read is put off."""

MOST_OPEN = 2
"""Backward calls that may owe gradients at a time; each keeps its graph."""

OLDEST = 8
"""Later backward calls after which a debt is paid, so that its graph can go."""

MOST_FATES = 64
"""Kinds of backward calls that are told apart."""

CALLS_WITHOUT_USE = 256
"""Backward calls in a row that put nothing off; no more are looked at then."""

MOST_PAID = 2
"""Debts of calls like it that were paid though nobody had asked; no more are made then."""

Leaves = dict[int, Any]
"""By identity: tensors compare by their elements."""


@dataclass(eq=False)
class Fate:
    """What became of the gradients of one backward call, all the times that it was made.

    Attributes:
        times_dropped: without having been read, by the identity of the leaf.
        read: the leaves whose gradients somebody has asked for.
        times_paid: debts that had to be paid though nobody had asked.
    """

    times_dropped: Counter[int] = field(default_factory=Counter)
    read: set[int] = field(default_factory=set)
    times_paid: int = 0

    def is_dropped(self, identity: int) -> bool:
        """Whether the gradient of a parameter was always dropped unread."""
        return identity not in self.read and self.times_dropped[identity] >= TIMES_DROPPED


@dataclass(eq=False)
class Debt:
    """What a backward call owes.

    Attributes:
        edges: of the graph that the call began with, which the program cannot change; none once
            they are of no use.
        grads: those of its outputs, which nobody else has.
        kept: what the graph's formulas read.
        around: the state of torch at the time.
        fate: of the gradients of all calls like it.
        leaves: that are owed a gradient.
        age: in backward calls since.
        lost: why it cannot be paid any more.
    """

    edges: tuple[Any, ...]
    grads: tuple[Any, ...]
    kept: Kept
    around: tuple[Any, ...]
    fate: Fate
    leaves: Leaves
    age: int = 0
    lost: Exception | None = None


@dataclass(frozen=True)
class Forecast:
    """Of a backward call.

    Attributes:
        fate: of the gradients of all calls like it.
        wanted: the leaves that get their gradients now.
        put_off: those that are to wait.
        late: the nodes of the graph on the way to these.
        others: its other nodes.
    """

    fate: Fate
    wanted: Leaves
    put_off: Leaves
    late: list[Any]
    others: list[Any]


class OnDemand:
    """Stands between the program and its gradients.

    Args:
        backward_wrappers: of the host.
        on_skip: called with the reason why nothing is put off any more.
        on_failure: called when something here failed; all gradients are computed then.
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
        self._fates: defaultdict[tuple[frozenset[int], int], Fate] = defaultdict(Fate)
        self._unread: dict[int, set[Fate]] = {}
        self._debts: list[Debt] = []
        self._last_optimizer = 0
        self._calls_without_use = 0
        self._is_on = False
        self._is_over = False
        self._depth = 0
        self._thread: int | None = None
        self._places = contextlib.ExitStack()
        self._is_in_place = False
        _everywhere.add(self)

    def install(self) -> Undo:
        """Begin, or go on; the undo pays what is owed. Where that cannot be done any more, the
        undone places stay until the program has dropped those gradients."""
        self._is_on = True
        if not self._is_in_place and not self._is_over:
            self._is_in_place = True
            self._places.callback(
                self._backward_wrappers.append(self._instead_of_backward, self._has_failed)
            )
            self._take_gradients()
            self._take_zero_grad(torch.optim.Optimizer, _members)
            self._take_zero_grad(torch.nn.Module, _parameters)
            self._take_hooks()
            self._take_scaler()

        def undo() -> None:
            self._is_on = False
            self._pay_all()
            self._unread.clear()
            self._leave_if_done()

        return undo

    def stepped(self, optimizer: Any) -> None:
        """An optimizer has stepped."""
        self._last_optimizer = id(optimizer)

    def _leave_if_done(self) -> None:
        is_idle = (not self._is_on or self._is_over) and not self._debts
        if is_idle and not self._depth:
            self._is_in_place = False
            self._places.close()

    # Backward

    def _backward(self, own: Any, outputs: Any, grads: Any, args: Any, kwargs: Any) -> Any:
        found = None
        if self._is_on and not self._is_over:
            found = attempt(self._end_by, self._forecast, outputs, grads, args)
            if found is None or not found.put_off:
                self._count_in_vain()
        self._pay_before(found)
        if found is None:
            return own(outputs, grads, *args, **kwargs)
        if not found.put_off:
            result = own(outputs, grads, *args, **kwargs)
        else:
            self._calls_without_use = 0
            edges = tuple(map(get_gradient_edge, outputs))
            first = tuple(grad.clone() for grad in grads)
            keep_graph, create_graph = True, False
            wanted = tuple(found.wanted.values())
            kept = Kept()
            debt = Debt(edges, first, kept, surroundings.now(), found.fate, found.put_off)
            result = own(outputs, grads, keep_graph, create_graph, wanted, **kwargs)
            self._debts.append(debt)
            engagement.calls["gradients"] += 1
            is_kept = attempt(self._end_by, kept.keep, found.late, found.others)
            if not (is_kept and self._is_on):  # or a turn of the loop has ended in there
                self._pay(debt)
        for identity in found.wanted:
            self._unread.setdefault(identity, set()).add(found.fate)
        return result

    def _forecast(self, outputs: Any, grads: Any, args: Any) -> Forecast | None:
        """What to do in a backward call; ``None`` for one that is left alone."""
        keep_graph, create_graph, inputs = args
        if keep_graph or create_graph or inputs:
            return None
        if is_distributed():
            self._end("other processes wait for the gradients of this one")
            return None
        if any(map(torch.is_autocast_enabled, autocast_devices())):
            return None
        if any(grad is None or grad.is_inference() for grad in grads):
            return None
        if torch.is_anomaly_enabled() or torch._C._len_torch_dispatch_stack():
            return None  # somebody looks at what backward computes
        edges = list(graph.edges(outputs))
        leaves = _leaves(edges)
        if leaves is None or any(map(_has_hooks, leaves.values())):
            return None
        parameters = frozenset(i for i, leaf in leaves.items() if _is_parameter(leaf))
        fate = self._fates[parameters, self._last_optimizer]
        if len(self._fates) > MOST_FATES:
            self._end("its backward calls reach other parameters again and again")
        put_off: Leaves = {}
        if len(self._debts) < MOST_OPEN and fate.times_paid < MOST_PAID:
            dropped = {i: leaf for i, leaf in leaves.items() if fate.is_dropped(i)}
            put_off = {i: leaf for i, leaf in dropped.items() if _can_wait(leaf)}
        if len(put_off) == len(leaves):
            put_off = {}  # a call for nobody; to torch, no inputs would mean all of them
        late = _on_the_way(edges, put_off) if put_off else set()
        if not (late and all(map(is_known, late)) and all(map(Kept.can_be_read, late))):
            put_off = {}
        others = {node for node, _ in edges} - late if put_off else ()
        wanted = {i: leaf for i, leaf in leaves.items() if i not in put_off}
        return Forecast(fate, wanted, put_off, list(late), list(others))

    def _count_in_vain(self) -> None:
        self._calls_without_use += 1
        if self._calls_without_use >= CALLS_WITHOUT_USE:
            self._end(f"nothing could be put off in {CALLS_WITHOUT_USE} backward calls")

    def _end(self, why: str) -> None:
        """Put nothing off from now on; what is owed stays so."""
        if not self._is_over:
            self._is_over = True
            self._fates.clear()
            self._unread.clear()
            self._on_skip(why)

    def _end_by(self, error: Exception) -> None:
        """The same, for a failure of ours."""
        self._is_over = True
        self._on_failure(error)

    # Debts

    def _pay_before(self, call: Forecast | None) -> None:
        """Pay what must be added before a backward call adds to it, and what is old.

        Args:
            call: the one that is about to begin; ``None``: it may reach any leaf.
        """
        for debt in list(self._debts):
            debt.age += 1
            is_met = call is None or not debt.leaves.keys().isdisjoint(call.wanted)
            if is_met or debt.age > OLDEST:
                debt.fate.times_paid += 1
                self._pay(debt)

    def _pay_all(self) -> None:
        for debt in list(self._debts):
            self._pay(debt)

    def _pay(self, debt: Debt) -> None:
        """Compute all that is owed. Where that fails, the debt is lost: an error to whoever asks
        for it, and to nobody else.

        Raises:
            BaseException: the program was interrupted meanwhile; the debt is lost as well.
        """
        for earlier in self._debts[: self._debts.index(debt)] if debt in self._debts else ():
            if not earlier.leaves.keys().isdisjoint(debt.leaves):
                self._pay(earlier)
        if debt not in self._debts or debt.lost is not None:
            return
        leaves = list(debt.leaves.values())
        frozen = [leaf for leaf in leaves if not leaf.requires_grad]
        keep_graph = create_graph = False
        self._depth += 1
        try:
            for leaf in frozen:  # torch adds nothing to these
                leaf.requires_grad_(True)
            with (
                torch.inference_mode(False),
                without_autocast(),
                surroundings.like(debt.around),
                debt.kept.readable(),
            ):
                run_backward(
                    *(debt.edges, debt.grads, keep_graph, create_graph, tuple(leaves)),
                    allow_unreachable=True,
                    accumulate_grad=True,
                )
        except BaseException as error:
            # Without its frames, which keep the graph.
            debt.lost = RuntimeError(f"{type(error).__name__}: {error}")
            debt.edges = debt.grads = ()
            if not isinstance(error, RuntimeError):
                raise
        else:
            self._debts.remove(debt)
            for identity in debt.leaves:
                self._unread.setdefault(identity, set()).add(debt.fate)
        finally:
            debt.kept.release()
            self._depth -= 1
            for leaf in frozen:
                leaf.requires_grad_(False)

    def _drop(self, leaves: Iterable[Any]) -> None:
        """Their gradients are about to be dropped: what is owed to them is not wanted any more."""
        for leaf in leaves:
            identity = id(leaf)
            for debt in self._debts:
                debt.leaves.pop(identity, None)
            fates = self._unread.pop(identity, ())
            if fates and _is_sparse(leaf):
                continue  # nobody can say of which kind its zeros are to be
            for fate in fates:
                fate.times_dropped[identity] += 1
        for debt in [debt for debt in self._debts if not debt.leaves]:
            self._debts.remove(debt)
            debt.kept.release()
        self._leave_if_done()

    def _is_owed(self, leaf: Any) -> bool:
        return any(id(leaf) in debt.leaves for debt in self._debts)

    def _read(self, own: Callable[[Any], Any], leaf: Any) -> Any:
        """As ``Parameter.grad``."""
        identity = id(leaf)
        for debt in [debt for debt in self._debts if identity in debt.leaves]:
            self._pay(debt)
        for fate in self._unread.pop(identity, ()):
            fate.read.add(identity)
        gradient = own(leaf)
        self._leave_if_done()
        return gradient

    def _paid(self, leaf: Any) -> Any:
        """What torch keeps.

        Raises:
            RuntimeError: it was put off, and cannot be computed any more.
        """
        for debt in self._debts:
            if id(leaf) in debt.leaves:
                raise RuntimeError(
                    "a gradient that flatout has put off is asked for after all, and cannot be "
                    "computed any more: run without gradients=on_demand"
                ) from debt.lost
        return stored_gradient.__get__(leaf)

    def _write(self, own: Callable[[Any, Any], None], leaf: Any, gradient: Any) -> None:
        own(leaf, gradient)
        self._drop([leaf])

    def _delete(self, own: Callable[[Any], None], leaf: Any) -> None:
        own(leaf)
        self._drop([leaf])

    def _cancel(self, leaves: Iterable[Any]) -> None:
        """What is owed to these is not wanted any more."""
        for leaf in leaves:
            for debt in self._debts:
                debt.leaves.pop(id(leaf), None)

    # Places

    def _instead_of_backward(
        self, own: Any, outputs: Any, grads: Any, *args: Any, **kwargs: Any
    ) -> Any:
        is_idle = (not self._is_on or self._is_over) and not self._debts
        if is_idle or not kwargs.get("accumulate_grad") or self._depth:
            return own(outputs, grads, *args, **kwargs)
        if self._thread is None:
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            self._end("its backward calls come from several threads")
        self._depth += 1
        try:
            return self._backward(own, outputs, grads, args, kwargs)
        finally:
            self._depth -= 1
            self._leave_if_done()

    def _has_failed(self, error: Exception) -> None:
        """What stands in the place of a function of torch, which is about to be called, or was."""
        self._end_by(error)
        self._pay_all()

    def _take_gradients(self) -> None:
        def written(leaf: Any, gradient: Any) -> None:
            stored_gradient.__set__(leaf, gradient)
            self._cancel([leaf])

        def deleted(leaf: Any) -> None:
            stored_gradient.__delete__(leaf)
            self._cancel([leaf])

        taken = property(
            wrap(self._has_failed, self._read, self._paid),
            wrap(self._has_failed, self._write, written),
            wrap(self._has_failed, self._delete, deleted),
            stored_gradient.__doc__,
        )
        for name in ("grad", "_grad"):
            self._places.callback(add_attribute(torch.nn.Parameter, name, taken))

    def _take_zero_grad(self, owner: Any, leaves_of: Callable[[Any], Iterable[Any]]) -> None:
        def zero_grad(own: Any, owning: Any, set_to_none: bool = True) -> None:
            leaves = list(leaves_of(owning))
            unmade = [] if set_to_none else [leaf for leaf in leaves if self._is_owed(leaf)]
            self._drop(leaves)
            own(owning, set_to_none=set_to_none)
            for leaf in unmade:
                if stored_gradient.__get__(leaf) is None:
                    stored_gradient.__set__(leaf, torch.zeros_like(leaf))

        function = wrap(self._has_failed, zero_grad, owner.__dict__["zero_grad"])
        is_optimizer = owner is torch.optim.Optimizer  # whose own dynamo does not look at either
        function = _torch._disable_dynamo(function) if is_optimizer else function
        self._places.callback(replace_function(owner, "zero_grad", function))

    def _take_hooks(self) -> None:
        """What hangs on a tensor, or on what is saved for backward, does not show in the graph."""
        tensor: Any = torch.Tensor
        own_retain = tensor.retain_grad

        def see(hooked: Any) -> None:
            if hooked.is_leaf:
                for debt in [debt for debt in self._debts if id(hooked) in debt.leaves]:
                    self._pay(debt)
            else:
                see_within()

        def see_within() -> None:
            self._end("the program hangs hooks on what lies between its parameters and losses")
            self._pay_all()  # a hook is not called for what was before it

        def register(own: Any, hooked: Any, hook: Any) -> Any:
            see(hooked)
            return own(hooked, hook)

        def register_on_node(own: Any, hooks: Any, hook: Any) -> Any:
            see_within()
            return own(hooks, hook)

        def retain_grad(hooked: Any) -> None:
            attempt(self._has_failed, see, hooked)
            own_retain(hooked)

        def enter(own: Any, hooks: Any) -> Any:
            self._end("the program has hooks on what is saved for backward, as checkpoints do")
            return own(hooks)

        on_node = wrap(self._has_failed, register_on_node, _HookMixin._register_hook)
        for undo in (
            wrap_function(tensor, "register_hook", self._has_failed, register),
            wrap_function(tensor, "register_post_accumulate_grad_hook", self._has_failed, register),
            add_attribute(tensor, "retain_grad", retain_grad),
            replace_function(_HookMixin, "_register_hook", staticmethod(on_node)),
            wrap_function(saved_tensors_hooks, "__enter__", self._has_failed, enter),
        ):
            self._places.callback(undo)

    def _take_scaler(self) -> None:
        """The graph of a scaled loss begins with the scale, which is written at each update."""

        def scale(own: Any, scaler: Any, outputs: Any) -> Any:
            if scaler.is_enabled():
                self._end("the program scales its losses")
            return own(scaler, outputs)

        on_failure = self._has_failed
        self._places.callback(wrap_function(torch.amp.GradScaler, "scale", on_failure, scale))


_everywhere: weakref.WeakSet[OnDemand] = weakref.WeakSet()


def _pay_before_fork() -> None:
    """A child could not: the threads that compute do not live on in it."""
    for on_demand in list(_everywhere):
        on_demand._pay_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_pay_before_fork)


def is_distributed() -> bool:
    """Whether this is one of several processes that train together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _parameters(module: torch.nn.Module) -> Iterable[Any]:
    """Those that ``Module.zero_grad`` goes over; none where the program decides that."""
    own = torch.nn.Module.__dict__
    deciding = ("parameters", "named_parameters", "named_modules", "_named_members")
    if any(inspect.getattr_static(module, name, None) is not own[name] for name in deciding):
        return ()
    return objects.parameters(module)


def _members(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _leaves(edges: Iterable[tuple[Any, Any]]) -> Leaves | None:
    """The leaves of a graph; ``None`` where something in it may have to be called for its own
    sake."""
    leaves: Leaves = {}
    for node, _ in edges:
        if node is None or is_of_program(node):
            return None
        leaf = graph.leaf_of(node)
        if leaf is not None and leaf.requires_grad:  # torch leaves one alone that is frozen since
            leaves[id(leaf)] = leaf
    return leaves


def _on_the_way(edges: Iterable[tuple[Any, Any]], leaves: Leaves) -> set[Any]:
    """The nodes of a graph that lead to some of its leaves, and those of the leaves themselves."""
    parents: defaultdict[Any, list[Any]] = defaultdict(list)
    for node, parent in edges:
        parents[node].append(parent)
    left = [node for node in parents if id(graph.leaf_of(node)) in leaves]
    found = set(left)
    while left:
        for parent in parents[left.pop()]:
            if parent is not None and parent not in found:
                found.add(parent)
                left.append(parent)
    return found


def _can_wait(leaf: Any) -> bool:
    """Whether ``Parameter.grad`` is the only way to the gradient of a leaf."""
    if stored_gradient.__get__(leaf) is None:
        return _is_parameter(leaf)
    is_held = _is_sparse(leaf) or _holders(leaf) > _FEWEST_HOLDERS
    return _is_parameter(leaf) and not is_held


def _has_hooks(leaf: Any) -> bool:
    """Whether something may look at gradients while backward runs."""
    return bool(leaf._backward_hooks or leaf._post_accumulate_grad_hooks)


def _is_parameter(leaf: Any) -> bool:
    return torch.nn.Parameter in type(leaf).__mro__


def _holders(leaf: Any) -> int:
    """How many references there are to the gradient that torch keeps, in Python and in torch, and
    to its memory."""
    gradient = stored_gradient.__get__(leaf)
    uses: int = _torch._C._storage_Use_Count(gradient.untyped_storage()._cdata)
    return sys.getrefcount(gradient) + int(gradient._use_count()) + uses


def _probe() -> Any:
    leaf = torch.zeros(1, device="cpu", requires_grad=True)
    stored_gradient.__set__(leaf, torch.zeros(1, device="cpu"))
    return leaf


_FEWEST_HOLDERS = _holders(_probe())
"""Where the program has no reference of its own; through one it would see what torch adds."""


def _is_sparse(leaf: Any) -> bool:
    gradient = stored_gradient.__get__(leaf)
    return gradient is not None and gradient.layout is not torch.strided
