"""Other kernels for operators of torch, compiled ones among them."""

from __future__ import annotations

import ctypes
import functools
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.autograd import forward_ad

from flatout import kernels
from flatout.errors import RefusedError
from flatout.intercept import engagement
from flatout.intercept.arrays import PLAIN
from flatout.intercept.containment import Failed, arose_in_ours, attempt, report
from flatout.intercept.place import Undo

T = TypeVar("T")


def compiled(name: str, stays: str) -> ctypes.CDLL:
    """The library of a kernel that is to stand in for an operator.

    Args:
        name: of the kernel.
        stays: what is used without it, in words.

    Raises:
        RefusedError: it cannot be had, or this torch cannot hand its own kernel over.
    """
    try:
        library = kernels.load(name)
    except kernels.KernelError as error:
        raise RefusedError(f"{stays} stay: {error}") from error
    if not hasattr(torch.library, "get_kernel"):
        raise RefusedError(f"{stays} stay: torch {torch.__version__} cannot hand its kernel over")
    return library


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether these are dense tensors on the CPU of no other class, outside of what transforms, and
    nobody looks on who would miss torch's operators: ``jit.trace``, ``make_fx``, a dispatch mode.
    """
    return (
        all(
            type(x) in PLAIN and x.is_cpu and x.layout is torch.strided and not x.is_nested
            for x in tensors
        )
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


class Call(NamedTuple):
    """What a function behind an operator wants to be called in its place.

    That is no part of what the function itself does: it may save tensors, which calls what the
    program has hung there, and an exception that comes out of it is none of ours.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = MappingProxyType({})


Function = Callable[..., Any]
"""Called with what lies below it and the operator's arguments, to which what lies below takes the
same. It returns what the operator is to return, a ``Call``, or ``None``: what lies below is
called. It computes past autograd, autocast, and what the program has that looks on."""


def layer(functions: Mapping[str, Function], *keys: str, failed: Failed) -> Undo:
    """Put functions behind operators that other knobs may have replaced, or will; returns the undo.

    Args:
        functions: by the operator's name without ``aten::``.
        keys: the dispatch keys that they are for.
        failed: told when one of them has failed; what lies below has done it then.
    """
    placed = []
    for (name, function), key in itertools.product(functions.items(), keys):
        if (name, key) not in _layers:
            _layers[name, key] = Layers(name, key)
        entry = (function, failed, applying)
        placed.append((name, key, entry))
        _layers[name, key].functions.append(entry)

    def undo() -> None:
        while placed:
            name, key, entry = placed.pop()
            layers = _layers[name, key]
            layers.functions.remove(entry)
            if not layers.functions:
                _layers.pop((name, key)).give_back()

    return undo


class Layers:
    """Functions behind one operator, one upon the other.

    Args:
        name: of the operator.
        key: the dispatch key.

    Attributes:
        functions: with whom to tell of their failures, and the knob whose they are; the topmost is
            the last one.
        give_back: puts torch's own kernel back.
    """

    def __init__(self, name: str, key: str) -> None:
        self.functions: list[tuple[Function, Failed, str | None]] = []
        self._own = _own(name, key)
        library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every replaced kernel
            library.impl(name, self._call, key, with_keyset=True)
        self.give_back: Undo = library._destroy

    def _call(self, keyset: Any, *args: Any, **kwargs: Any) -> Any:
        below: Callable[..., Any] = functools.partial(self._own, keyset)
        for function, failed, knob in self.functions:
            below = functools.partial(_called, failed, knob, function, below)
        return below(*args, **kwargs)


def _own(name: str, key: str) -> Callable[..., Any]:
    """Torch's own kernel, or what passes on to the next key where it has none."""
    qualified = f"aten::{name}"
    has_own = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)
    if has_own or not key.startswith("Autocast"):
        own: Callable[..., Any] = torch.library.get_kernel(qualified, key).call_boxed
        return own
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
    passed = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def next_one(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(passed):
            return operator(*args, **kwargs)

    return next_one


_layers: dict[tuple[str, str], Layers] = {}

applying: str | None = None
"""The knob that is being applied."""


def _called(
    failed: Failed,
    knob: str | None,
    function: Function,
    below: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    found = attempt_alone(failed, function, below, *args, **kwargs)
    if found is not None and knob is not None:
        engagement.calls[knob] += 1
    if type(found) is Call:
        try:
            return found.function(*found.args, **found.kwargs)
        except Exception as error:
            if not arose_in_ours(error):
                raise
            report(failed, error)
            found = None
    return below(*args, **kwargs) if found is None else found


def attempt_alone(
    failed: Failed, function: Callable[..., T], *args: Any, **kwargs: Any
) -> T | None:
    """``attempt`` where nothing of what the function does is recorded, cast, or looked at."""
    return attempt(failed, _alone, function, *args, **kwargs)


def _alone(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(_LOOKING_ON):
        return function(*args, **kwargs)


def _key_set(*keys: str) -> Any:
    found = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, keys[0]))
    for key in keys[1:]:
        found = found.add(getattr(torch._C.DispatchKey, key))
    return found


_LOOKING_ON = _key_set(
    *("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"),
    *("AutocastCPU", "Python", "PythonTLSSnapshot"),
)


# What autograd records of it


class Way(Protocol):
    """How gradients are computed of what a function of ours has given."""

    @property
    def failed(self) -> Failed:
        """Told when ``gradients`` has failed; ``again`` has done it then."""

    def gradients(self, saved: Any, needed: Sequence[bool], gradient: torch.Tensor) -> Any:
        """Those of the inputs, by our kernel.

        Args:
            saved: the tensors kept for it.
            needed: of each input, whether its gradient is.
            gradient: of the output, plain.
        """

    def again(self, saved: Any, needed: Sequence[bool], gradient: torch.Tensor) -> Any:
        """The same by operators of torch, of which a graph can be recorded."""


class Recorded(torch.autograd.Function):
    """A node of autograd's graph for what has been computed already; see ``recorded``."""

    @staticmethod
    def forward(
        ctx: Any,
        way: Way,
        made: tuple[torch.Tensor, Sequence[torch.Tensor | None]],
        *inputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Args: how gradients are computed, the output and what is saved, the inputs."""
        output, saved = made
        ctx.save_for_backward(*saved)
        ctx.way = way
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the inputs."""
        way, saved, needed = ctx.way, ctx.saved_tensors, ctx.needs_input_grad[2:]
        found = None
        if not torch.is_grad_enabled() and are_plain(gradient):
            found = attempt_alone(way.failed, way.gradients, saved, needed, gradient)
        if found is None:
            found = way.again(saved, needed, gradient)
        return None, None, *found


def recorded(
    node: type[Recorded],
    way: Way,
    output: torch.Tensor,
    saved: Sequence[torch.Tensor | None],
    *inputs: torch.Tensor | None,
) -> torch.Tensor:
    """The ``output`` that was computed past autograd, as a function of ``inputs`` for autograd.

    Args:
        node: the class of the node.
        way: how gradients are computed.
        output: of no other use yet.
        saved: tensors for that, inputs and the output among them.
        inputs: whose gradients are computed.
    """
    # As one argument: of a tensor that is one itself, the output would be a view.
    found: torch.Tensor = node.apply(way, (output, saved), *inputs)
    return found
